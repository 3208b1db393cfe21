"""How a short-lived command reaches the cluster's etcd. Not here: what it does there (cluster/jobs.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from elasticd.cluster.etcd import EtcdStore
from elasticd.cluster.store import Store
from elasticd.config import EtcdConfig, load_etcd
from elasticd.daemon.main import make_etcd_store
from elasticd.errors import ConfigError, OperatorError, StoreUnavailable

DEFAULT_CONFIG = "/etc/elasticd/elasticd.toml"


def find_etcd_config(endpoints: str, config: str) -> EtcdConfig:
    """From --endpoints, --config and the default file, the first that is there. ConfigError when none is."""
    path = config or (DEFAULT_CONFIG if Path(DEFAULT_CONFIG).exists() else "")
    if not endpoints and not path:
        raise ConfigError("no cluster named: give --endpoints HOST:PORT, set ELASTICD_ENDPOINTS, or give --config FILE")
    return load_etcd(path, endpoints)


@contextlib.contextmanager
def open_cluster(endpoints: str, config: str) -> Iterator[Store]:
    """The store, once for a command; OperatorError when no member answers."""
    etcd = find_etcd_config(endpoints, config)
    store: EtcdStore = make_etcd_store(etcd)
    try:
        yield store
    except StoreUnavailable as error:
        raise unreachable(etcd, error) from error
    finally:
        store.close()


def unreachable(etcd: EtcdConfig, error: StoreUnavailable) -> OperatorError:
    """What to tell a person: which etcd, what it said, what to look at."""
    return OperatorError(
        f"etcd at {', '.join(etcd.endpoints)} cannot be reached ({error}): check that it runs there and that the "
        "endpoints are right"
    )

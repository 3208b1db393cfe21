"""Configuration: TOML, then environment, parsed once into frozen dataclasses. Errors name the field.

Not here: the command line (cli.py), jobs (job_file.py). Units are in the names.
"""

from __future__ import annotations

import os
import ssl
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from elasticd.addresses import default_node_id, find_address, is_loopback, is_unspecified
from elasticd.core.model import Topology
from elasticd.errors import ConfigError
from elasticd.toml_form import Form, checked_name, read_form


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdConfig:
    """Where etcd is, and how to be let in. The password comes from a file, never from the command line."""

    endpoints: tuple[str, ...] = ()
    ca: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password_file: str = ""

    def credentials(self) -> tuple[str, str] | None:
        """(user, password), or None. ConfigError when the password cannot be read."""
        if not self.user:
            return None
        try:
            return self.user, Path(self.password_file).read_text().strip()
        except OSError as error:
            raise ConfigError(f"etcd.password_file {self.password_file!r}: {error.strerror}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksConfig:
    """Mutual TLS between daemons; plain text only on loopback, or when said so."""

    ca: str = ""
    cert: str = ""
    key: str = ""
    insecure: bool = False

    @property
    def tls(self) -> bool:
        return bool(self.ca and self.cert and self.key)

    def contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext] | None:
        """(server, client), each demanding the other's certificate; None for plain text."""
        if not self.tls:
            return None
        try:
            server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.ca)
            client = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=self.ca)
            for context in (server, client):
                context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"links.ca, links.cert or links.key cannot be used: {error}") from error
        server.verify_mode = ssl.CERT_REQUIRED
        # Nodes are told apart by their ids and boot ids; the certificate proves that they belong to the cluster.
        client.check_hostname = False
        return server, client


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    address: str = ""
    port: int = 7421
    tls_cert: str = ""
    tls_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionConfig:
    heartbeat_s: float = 0.1
    dead_after_s: float = 0.5
    lease_ttl_s: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """Copies of the workers' state in RAM. ``limit_bytes``: for all of them on this node, those kept for others too;
    0 keeps none, None means a quarter of the machine's memory. ``folder`` is on tmpfs."""

    limit_bytes: int | None = None
    folder: str = "/dev/shm"  # noqa: S108 - it is there to be shared
    port: int = 7422


@dataclass(frozen=True, slots=True, kw_only=True)
class StragglersConfig:
    """The cluster's, so the same on every node (core/stragglers.py, Policy)."""

    enabled: bool = True
    eviction_budget: float = 0.1
    eviction_window_s: int = 3600
    quarantine_after: int = 2
    quarantine_s: int = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """All that a daemon is told. ``peer_port``, ``metrics.port`` and ``memory.port`` 0: the kernel chooses."""

    node_id: str
    address: str
    peer_port: int = 7420
    topology: Topology = field(default_factory=Topology)
    run_dir: str = "/run/elasticd"
    log_dir: str = "/var/log/elasticd"
    python: str = ""
    history_file: str = ""
    etcd: EtcdConfig = field(default_factory=EtcdConfig)
    links: LinksConfig = field(default_factory=LinksConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    stragglers: StragglersConfig = field(default_factory=StragglersConfig)

    @property
    def is_on_loopback(self) -> bool:
        return is_loopback(self.address)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """What ``elasticd run`` decides for its own node: how the workers' output goes, as torchrun has it."""

    role: str = "default"
    redirects: str = "0"
    tee: str = "0"
    log_dir: str = ""
    local_ranks_filter: str = ""
    log_line_prefix_template: str = ""
    start_method: str = "warm"
    virtual_local_rank: bool = False
    duplicate_stdout_filters: tuple[str, ...] = ()
    duplicate_stderr_filters: tuple[str, ...] = ()
    event_log_handler: str = "null"


# --- the files' form ---


def _name_or_none(value: str) -> str:
    return checked_name(value) if value else value


class _NodeForm(Form):
    id: Annotated[str, AfterValidator(_name_or_none)] = ""
    address: str = ""
    peer_port: int = Field(default=7420, ge=0, le=65535)
    zone: str = ""
    rack: str = ""
    switch: str = ""
    run_dir: str = "/run/elasticd"
    log_dir: str = "/var/log/elasticd"
    python: str = ""
    history_file: str = ""


class _EtcdForm(Form):
    endpoints: list[str] = Field(default_factory=list)
    ca: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password_file: str = ""


class _LinksForm(Form):
    ca: str = ""
    cert: str = ""
    key: str = ""
    insecure: bool = False


class _MetricsForm(Form):
    address: str = ""
    port: int = Field(default=7421, ge=0, le=65535)
    tls_cert: str = ""
    tls_key: str = ""


class _DetectionForm(Form):
    heartbeat_s: float = Field(default=0.1, gt=0, le=10)
    dead_after_s: float = Field(default=0.5, gt=0, le=60)
    lease_ttl_s: int = Field(default=5, ge=2, le=300)


class _MemoryForm(Form):
    limit_bytes: int | None = Field(default=None, ge=0)
    folder: str = "/dev/shm"  # noqa: S108 - it is there to be shared
    port: int | None = Field(default=None, ge=0, le=65535)


class _StragglersForm(Form):
    enabled: bool = True
    eviction_budget: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    eviction_window_s: int = Field(default=3600, ge=1)
    quarantine_after: int = Field(default=2, ge=1)
    quarantine_s: int = Field(default=3600, ge=1)


class _DaemonForm(Form):
    node: _NodeForm = Field(default_factory=_NodeForm)
    etcd: _EtcdForm = Field(default_factory=_EtcdForm)
    links: _LinksForm = Field(default_factory=_LinksForm)
    metrics: _MetricsForm = Field(default_factory=_MetricsForm)
    detection: _DetectionForm = Field(default_factory=_DetectionForm)
    memory: _MemoryForm = Field(default_factory=_MemoryForm)
    stragglers: _StragglersForm = Field(default_factory=_StragglersForm)


def load_daemon(path: str, environment: Mapping[str, str] = os.environ) -> DaemonConfig:
    """A daemon's configuration from a TOML file, overridden by ELASTICD_NODE_ID, _ADDRESS and _ENDPOINTS."""
    form = read_form(_DaemonForm, path)
    etcd = _choose_etcd(path, form.etcd, environment.get("ELASTICD_ENDPOINTS", ""))
    node = form.node
    config = DaemonConfig(
        node_id=environment.get("ELASTICD_NODE_ID") or node.id or default_node_id(),
        address=environment.get("ELASTICD_ADDRESS") or node.address or find_address(etcd.endpoints),
        peer_port=node.peer_port,
        topology=Topology(zone=node.zone, rack=node.rack, switch=node.switch),
        run_dir=node.run_dir,
        log_dir=node.log_dir,
        python=node.python,
        history_file=node.history_file,
        etcd=etcd,
        links=LinksConfig(**form.links.model_dump()),
        metrics=MetricsConfig(**form.metrics.model_dump()),
        detection=DetectionConfig(**form.detection.model_dump()),
        memory=_memory(form),
        stragglers=StragglersConfig(**form.stragglers.model_dump()),
    )
    return checked(config)


def _memory(form: _DaemonForm) -> MemoryConfig:
    """Where the kernel is to choose the daemon's port, it chooses this one too, unless it is named."""
    asked = form.memory
    port = asked.port if asked.port is not None else 7422 if form.node.peer_port else 0
    return MemoryConfig(limit_bytes=asked.limit_bytes, folder=asked.folder, port=port)


def load_etcd(path: str, endpoints: str = "") -> EtcdConfig:
    """Only where etcd is: from ``endpoints`` (comma-separated), and for the rest the [etcd] of a file, if one is named.

    ConfigError when the file is wrong, or nothing names an endpoint.
    """
    form = read_form(_DaemonForm, path).etcd if path else _EtcdForm()
    return _choose_etcd(path, form, endpoints)


def _choose_etcd(path: str, form: _EtcdForm, override: str) -> EtcdConfig:
    """``override``: endpoints that go before the file's, comma-separated."""
    named = override.split(",") if override else form.endpoints
    chosen = tuple(endpoint.strip() for endpoint in named if endpoint.strip())
    if not chosen:
        raise ConfigError(f"{path}: etcd.endpoints is empty; name at least one, as http://HOST:2379")
    if form.user and not form.password_file:
        raise ConfigError(f"{path}: etcd.password_file is missing: the file that holds the password of etcd.user")
    _belong_together("etcd", cert=form.cert, key=form.key)
    return EtcdConfig(**{**form.model_dump(), "endpoints": chosen})


def _belong_together(section: str, **files: str) -> None:
    missing = [name for name, value in files.items() if not value]
    if missing and len(missing) < len(files):
        raise ConfigError(f"{section}.{', '.join(missing)} missing: {', '.join(files)} belong together")


def config_for_run(
    endpoints: tuple[str, ...],
    *,
    run_dir: str,
    address: str = "",
    node_id: str = "",
    links: LinksConfig | None = None,
    base: DaemonConfig | None = None,
    memory_bytes: int | None = None,
) -> DaemonConfig:
    """A node that lives as long as one job: an id, ports and a folder of its own, so that several share a machine.

    Links are plain text unless ``links`` or ``base`` (a daemon's file) says otherwise, as torchrun's are.
    ``memory_bytes``: for copies in RAM, instead of what ``base`` says.
    """
    known = base or DaemonConfig(node_id="", address="", etcd=EtcdConfig(endpoints=endpoints))
    place = address or known.address or find_address(endpoints)
    own = links or known.links
    limit_bytes = known.memory.limit_bytes if memory_bytes is None else memory_bytes
    return checked(
        replace(
            known,
            node_id=node_id or f"{default_node_id()[:50]}-{uuid.uuid4().hex[:8]}",
            address=place,
            peer_port=0,
            run_dir=run_dir,
            log_dir="",
            links=replace(own, insecure=own.insecure or not own.tls),
            metrics=replace(known.metrics, address=place, port=0),
            memory=replace(known.memory, port=0, limit_bytes=limit_bytes),
        )
    )


def checked(config: DaemonConfig) -> DaemonConfig:
    """The same, if its parts fit together; ConfigError with the field otherwise."""
    try:
        checked_name(config.node_id)
    except ValueError as error:
        raise ConfigError(f"node.id {error}") from error
    if is_unspecified(config.address):
        raise ConfigError(f"node.address {config.address} is not one that other nodes can reach: name this host's own")
    if config.detection.dead_after_s < 2 * config.detection.heartbeat_s:
        raise ConfigError("detection.dead_after_s must be at least twice detection.heartbeat_s")
    if config.memory.limit_bytes != 0 and not Path(config.memory.folder).is_dir():
        raise ConfigError(f"memory.folder {config.memory.folder}: no such folder; name one on tmpfs, as /dev/shm is")
    links = config.links
    _belong_together("links", ca=links.ca, cert=links.cert, key=links.key)
    _belong_together("metrics", tls_cert=config.metrics.tls_cert, tls_key=config.metrics.tls_key)
    if not links.tls and not links.insecure and not is_loopback(config.address):
        raise ConfigError(
            f"links to other daemons on {config.address} would be plain text: set links.ca, links.cert and links.key, "
            "or links.insecure = true"
        )
    return replace(config, metrics=replace(config.metrics, address=config.metrics.address or config.address))

"""What crosses the boundary between nodes, counted at their network interfaces: by order of ranks, and in two levels."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from worker_runs import Rank, environment, run_world

from elasticd import average_in_two_levels
from elasticd.bench.balance_train import sent_bytes
from elasticd.errors import ConfigError
from elasticd.testing.hosts import NamespaceHosts

STEPS, WIDTH = 5, 1000
GRADIENT_BYTES = 4 * WIDTH * WIDTH


def trained(two_levels: bool) -> DistributedDataParallel:
    """A model of several buckets, and an odd number of parameters, after steps on samples of each rank's own."""
    torch.manual_seed(0)
    layers = [nn.Linear(7, 31), nn.Tanh(), nn.Linear(31, 31), nn.Tanh(), nn.Linear(31, 1)]
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=0.003)
    if two_levels:
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        average_in_two_levels(model, mesh)
    generator = torch.Generator().manual_seed(dist.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(4, 7, generator=generator)).square().mean().backward()
        optimizer.step()
    return model


def compare() -> None:
    """Run by a rank of four."""
    dist.init_process_group("gloo")
    flat, levels = trained(two_levels=False), trained(two_levels=True)
    for one, other in zip(flat.parameters(), levels.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for wrong in (mesh["replicate"], init_device_mesh("cpu", (1, 4), mesh_dim_names=("replicate", "tp"))):
        with pytest.raises(ConfigError, match='needs "replicate" and "shard"'):
            average_in_two_levels(flat, wrong)
    pair = DistributedDataParallel(nn.Linear(2, 2), process_group=mesh.get_group("shard"))
    with pytest.raises(ConfigError, match=r"2 x 2 data-parallel ranks, and the model averages over 2"):
        average_in_two_levels(pair, mesh)
    dist.destroy_process_group()


def test_two_levels_give_the_same_mean() -> None:
    assert run_world(4, compare) == [""] * 4  # nor does torch warn of anything


def count(two_levels: bool) -> int:
    """Bytes that left this host for each step."""
    model = DistributedDataParallel(nn.Linear(WIDTH, WIDTH, bias=False))
    if two_levels:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        average_in_two_levels(model, mesh)
    before = 0
    for step in range(STEPS + 1):
        if step == 1:  # connections stand, and buckets are as they stay
            dist.barrier()
            before = sent_bytes()
        model(torch.ones(1, WIDTH)).mean().backward()
    dist.barrier()
    return (sent_bytes() - before) // STEPS


def report(number: int) -> None:
    """Run by one of two processes on each of two hosts; ``number``: 0 and 1 on the first."""
    found = {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], 29500, world_size=4, is_master=number == 0)
    for name, rank, two_levels in (
        ("flat", number, False),
        ("two levels", number, True),
        ("interleaved", (0, 2, 1, 3)[number], False),  # neighbours in the ring are never on one host
    ):
        dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=4)
        found[name] = count(two_levels)
        dist.destroy_process_group()
    print(json.dumps(found))
    store.set(f"done {number}", "")
    store.wait([f"done {each}" for each in range(4)])


@pytest.mark.net
@pytest.mark.usefixtures("namespaces")
def test_what_crosses_between_two_nodes_of_two_ranks() -> None:
    """A ring of n ranks carries 2 (n - 1) / n times the gradients over each of its links; two levels 2 (N - 1) / N."""
    with NamespaceHosts() as hosts, ExitStack() as stack:
        made = [hosts.add(f"n{i}") for i in range(2)]
        ranks = []
        for number in range(4):
            host = made[number // 2]
            env = environment(
                MASTER_ADDR=made[0].address,
                GLOO_SOCKET_IFNAME=host.interface,
                ELASTICD_TEST_NETNS=host.netns,
            )
            ranks.append(Rank(report, (number,), env))
            stack.callback(ranks[-1].close)
        for rank in ranks:
            assert rank.wait() == 0, rank.output
        for number in (0, 2):
            found = json.loads(ranks[number].output.splitlines()[-1])
            per_step = {name: sent / GRADIENT_BYTES for name, sent in found.items()}
            print(per_step)
            assert per_step["flat"] == pytest.approx(1.5, rel=0.1)
            assert per_step["two levels"] == pytest.approx(1.0, rel=0.1)
            assert per_step["interleaved"] == pytest.approx(3.0, rel=0.1)

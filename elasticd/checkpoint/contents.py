"""What is inside a checkpoint, for people and for other programs. Imports torch.

Whoever calls this has verified at least ``.metadata`` (to describe) or everything (to export): both unpickle.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from elasticd.checkpoint.objects import Location
from elasticd.checkpoint.reader import plain_reader
from elasticd.errors import ConfigError

MODEL_PREFIX = "model."


def describe_tensors(checkpoint: Location) -> list[dict[str, Any]]:
    """Name, dtype, shape and number of pieces of each, by name."""
    found = plain_reader(checkpoint).read_metadata().state_dict_metadata
    return [
        {
            "name": name,
            "dtype": str(one.properties.dtype).removeprefix("torch."),
            "shape": list(one.size),
            "chunks": len(one.chunks),
        }
        for name, one in sorted(found.items())
        if isinstance(one, TensorStorageMetadata)
    ]


def export_model(checkpoint: Location, target: Path) -> int:
    """Write the model's tensors, whole, as safetensors with DCP's own storage; how many they are.

    They are held in memory together. ConfigError when the package is missing, or the checkpoint holds no model; OSError
    when the target cannot be written.
    """
    try:
        import safetensors  # noqa: F401
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    except ImportError as error:
        raise ConfigError("export needs the package safetensors: pip install 'elasticd[export]'") from error
    found = plain_reader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in found.items()
        if isinstance(one, TensorStorageMetadata) and name.startswith(MODEL_PREFIX)
    }
    if not state:
        raise ConfigError(f"{checkpoint} holds no model: nothing is named {MODEL_PREFIX}*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "torch.distributed is disabled": none is needed
        dcp_load(state, storage_reader=plain_reader(checkpoint), no_dist=True)
        named = {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in state.items()}
        try:
            dcp_save(named, storage_writer=HuggingFaceStorageWriter(str(target)), no_dist=True)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
    return len(named)

"""What a checkpoint holds, for whoever must ask before it is loaded: DCP refuses to load what is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

#: The keys under which a value lies in the nested state that was saved: text in dicts, whatever they were; numbers in
#: lists.
Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """``world_size``: of the ranks that saved it. The rest goes by DCP's name ("model.0.weight")."""

    world_size: int
    tensors: Mapping[str, TensorStorageMetadata]
    #: Of whatever it holds; empty where it was saved in another form than ours.
    paths: Mapping[str, Path]

    @property
    def sizes(self) -> Mapping[str, torch.Size]:
        """Of its tensors."""
        return {name: each.size for name, each in self.tensors.items()}

    def is_split(self, name: str) -> bool:
        """Whether several ranks have saved a part of this tensor each."""
        return name in self.tensors and len(self.tensors[name].chunks) > 1

    def blank(self, name: str) -> torch.Tensor | None:
        """A tensor to be filled, whole and on the CPU; None for what is no tensor."""
        if name not in self.tensors:
            return None
        return torch.empty(self.tensors[name].size, dtype=self.tensors[name].properties.dtype)


def held_by(metadata: Metadata, world_size: int) -> Held:
    named = metadata.state_dict_metadata.items()
    known: Mapping[str, Path] = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    return Held(
        world_size=world_size,
        tensors={name: each for name, each in named if isinstance(each, TensorStorageMetadata)},
        paths={name: known[name] for name, _ in named if name in known},
    )

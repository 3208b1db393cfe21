"""A Hugging Face Trainer script as it is: a small GPT-2 from its config, on the text of Python's standard library.

    elasticd run --nproc-per-node 2 --max-restarts 3 -m elasticd.examples.hf_trainer --output-dir DIR
    torchrun --nproc-per-node 2 -m elasticd.examples.hf_trainer --output-dir DIR

Nothing of elasticd is imported here, and nothing is downloaded. Trainer finds its world in the environment, saves
checkpoints, and a restart resumes from the newest whole one. Its batch is per process and it counts epochs by it: on a
world of another size, other samples make a step (a Session's step is the same on any world).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

try:
    from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
except ModuleNotFoundError as missing:
    sys.exit(f"hf_trainer: {missing.name} is not installed: pip install 'elasticd[examples]'")


class StandardLibrary(Dataset[dict[str, torch.Tensor]]):
    """The top-level modules of the standard library as one text, cut into samples of ``length`` bytes."""

    def __init__(self, length: int) -> None:
        folder = Path(sysconfig.get_path("stdlib"))
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._length = length

    def __len__(self) -> int:
        return len(self._text) // self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The model shifts the labels itself: both are (length,)."""
        tokens = self._text[index * self._length : (index + 1) * self._length].long()
        return {"input_ids": tokens, "labels": tokens}


class Plain(TrainerCallback):  # type: ignore[misc]
    """One line for each log of rank 0, which a log file keeps."""

    def on_train_begin(self, args: Any, state: Any, _: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            print(f"begins at step {state.global_step} world {args.world_size}", flush=True)

    def on_log(self, args: Any, state: Any, _: Any, logs: dict[str, Any], **__: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            print(f"step {state.global_step} world {args.world_size} loss {float(logs['loss']):.4f}", flush=True)


def newest_checkpoint(folder: Path) -> str | None:
    """A checkpoint that was cut off by a kill is passed over. Trainer's state is what rank 0 writes last; a rank that
    was killed may not have come to the end of its own file, which is an archive, and ends in its index.
    """
    whole = []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        if all(map(zipfile.is_zipfile, path.parent.glob("rng_state*.pth"))):
            with contextlib.suppress(ValueError):
                whole.append((json.loads(path.read_text())["global_step"], str(path.parent)))
    return max(whole)[1] if whole else None


def train(arguments: argparse.Namespace) -> None:
    settings = TrainingArguments(
        output_dir=str(arguments.output_dir),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        learning_rate=1e-3,
        save_steps=arguments.save_every,
        save_total_limit=3,
        logging_steps=arguments.print_every,
        disable_tqdm=True,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        seed=1,
    )
    config = GPT2Config(
        vocab_size=256,
        n_positions=arguments.length,
        n_embd=arguments.width,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=settings,
        train_dataset=StandardLibrary(arguments.length),
        callbacks=[Plain()],
    )
    trainer.remove_callback(PrinterCallback)  # Plain says the step too
    result = trainer.train(resume_from_checkpoint=newest_checkpoint(arguments.output_dir))
    if trainer.is_world_process_zero():
        print(f"done at step {result.global_step}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="where checkpoints are saved and resumed from")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="sequences for each process")
    parser.add_argument("--length", type=int, default=64, help="bytes in a sequence")
    parser.add_argument("--width", type=int, default=64, help="width of the model")
    parser.add_argument("--save-every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--print-every", type=int, default=20)
    train(parser.parse_args())


if __name__ == "__main__":
    main()

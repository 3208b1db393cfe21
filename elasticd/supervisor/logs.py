"""Where workers' output goes: by round and rank, and never removed by a restart (torchrun's default removes it)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, Std, to_map


class RoundLogs(LogsSpecs):
    """``<log_dir>/<job>/round_<n>/rank_<r>/{stdout.log,stderr.log,error.json}``.

    Without a log_dir only error files are written, in a temporary folder of this agent.
    """

    def __init__(
        self,
        log_dir: str,
        redirects: Std | dict[int, Std] = Std.NONE,
        tee: Std | dict[int, Std] = Std.NONE,
        local_ranks_filter: set[int] | None = None,
    ) -> None:
        super().__init__(log_dir or tempfile.mkdtemp(prefix="elasticd-"), redirects, tee, local_ranks_filter)
        self.round_number = 0

    @property
    def root_log_dir(self) -> str:
        return str(self._root_log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Paths for each local rank; makes the folders, and tells the worker where its error goes."""
        count = len(envs)
        tee = to_map(self._tee, count)
        redirects = {rank: std | tee[rank] for rank, std in to_map(self._redirects, count).items()}
        made = LogsDest(filtered_stdout=self._filtered(envs, "stdout"), filtered_stderr=self._filtered(envs, "stderr"))
        for local_rank, env in envs.items():
            folder = self._folder(env)
            out, err = str(folder / "stdout.log"), str(folder / "stderr.log")
            shown = self._local_ranks_filter is None or local_rank in self._local_ranks_filter
            made.stdouts[local_rank] = out if redirects[local_rank] & Std.OUT else ("" if shown else os.devnull)
            made.stderrs[local_rank] = err if redirects[local_rank] & Std.ERR else ("" if shown else os.devnull)
            if shown and tee[local_rank] & Std.OUT:
                made.tee_stdouts[local_rank] = out
            if shown and tee[local_rank] & Std.ERR:
                made.tee_stderrs[local_rank] = err
            made.error_files[local_rank] = env["TORCHELASTIC_ERROR_FILE"] = str(folder / "error.json")
        return made

    def _filtered(self, envs: dict[int, dict[str, str]], stream: str) -> str:
        """Where the lines go that torchrun's duplicate filters pick, from all ranks of this node."""
        return str(self._folder(envs[0]).with_name(f"filtered_{stream}.log"))

    def _folder(self, env: dict[str, str]) -> Path:
        job, rank = env["TORCHELASTIC_RUN_ID"], env["RANK"]
        folder = Path(self.root_log_dir) / job / f"round_{self.round_number}" / f"rank_{rank}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

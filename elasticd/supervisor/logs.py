"""Where workers' output goes: by round and rank, and never removed by a restart (torchrun's default removes it)."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, Std, to_map


class RoundLogs(LogsSpecs):
    """``<log_dir>/<job>/round_<n>/rank_<r>/{stdout.log,stderr.log,error.json}``.

    What an earlier run of the same job left there is moved aside, to ``rank_<r>.1`` and so on. Without a log_dir, a
    temporary folder of this agent's. ``user``: who must be able to write there.
    """

    def __init__(
        self,
        log_dir: str,
        redirects: Std | dict[int, Std] = Std.NONE,
        tee: Std | dict[int, Std] = Std.NONE,
        local_ranks_filter: set[int] | None = None,
        user: str = "",
    ) -> None:
        super().__init__(log_dir or tempfile.mkdtemp(prefix="elasticd-"), redirects, tee, local_ranks_filter)
        self.round_number = 0
        self._made = "" if log_dir else self.root_log_dir
        self._owner = pwd.getpwnam(user) if user else None
        if self._made:
            self._give(Path(self._made))

    @property
    def root_log_dir(self) -> str:
        return str(self._root_log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Paths for each local rank; makes the folders, and tells the worker where its error goes."""
        count = len(envs)
        tee = to_map(self._tee, count)
        redirects = {rank: std | tee[rank] for rank, std in to_map(self._redirects, count).items()}
        first = self._folder(envs[0])
        made = LogsDest(
            filtered_stdout=str(first / "filtered_stdout.log"), filtered_stderr=str(first / "filtered_stderr.log")
        )
        for local_rank, env in envs.items():
            folder = self._fresh_folder(env)
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

    def close(self) -> None:
        """Removes the temporary folder, unless it holds output that somebody asked for."""
        nothing = not self._redirects and not self._tee
        if self._made and nothing:
            shutil.rmtree(self._made, ignore_errors=True)

    def _folder(self, env: dict[str, str]) -> Path:
        job, rank = env["TORCHELASTIC_RUN_ID"], env["RANK"]
        return Path(self.root_log_dir) / job / f"round_{self.round_number}" / f"rank_{rank}"

    def _fresh_folder(self, env: dict[str, str]) -> Path:
        folder = self._folder(env)
        if folder.exists():
            number = 1
            while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
                number += 1
            folder.rename(aside)
        folder.mkdir(parents=True)
        self._give(folder)
        return folder

    def _give(self, folder: Path) -> None:
        if self._owner is not None and self._owner.pw_uid != os.getuid():
            os.chown(folder, self._owner.pw_uid, self._owner.pw_gid)

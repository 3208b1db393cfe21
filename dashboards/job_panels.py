"""One job: its steps, its world, its checkpoints and its copies in RAM."""

from __future__ import annotations

from panel import RATE, J, lines, plot, stat

JOB = (
    stat("Step", f"max(elasticd_job_step{{{J}}})", "The newest completed step."),
    stat("Round", f"max(elasticd_job_round{{{J}}})", "Each change of the world is a new round."),
    stat("Ranks", f"max(elasticd_job_world_size{{{J}}})", "Size of the world; 0 while it waits for nodes."),
    stat(
        "Restarts left",
        f'max(elasticd_job_restart_budget{{{J}}}) - max(elasticd_job_restarts_total{{{J},cause="worker_failed"}})',
        "How often the script may still fail by itself. Lost nodes and joins are free.",
        low=None,
    ),
    stat(
        "Since the last step",
        f"time() - max(elasticd_job_last_step_timestamp_seconds{{{J}}})",
        "As reported by scripts that use a Session.",
        unit="s",
    ),
    stat(
        "Since the last checkpoint",
        f"time() - max(elasticd_checkpoint_last_commit_timestamp_seconds{{{J}}})",
        "What would be lost if everything stopped now.",
        unit="s",
    ),
    plot(
        "Steps per second",
        f"max(rate(elasticd_rank_steps_total{{{J}}}{RATE}))",
        "steps",
        "All ranks complete the same steps.",
        unit="ops",
    ),
    plot(
        "Samples per second",
        f"sum(rate(elasticd_rank_samples_total{{{J}}}{RATE}))",
        "samples",
        "Over all ranks.",
        unit="ops",
    ),
    plot(
        "What the script reports",
        f"avg by (name) (elasticd_job_metric{{{J}}})",
        "{{name}}",
        "step.report(loss=...): the last value, the mean over the nodes.",
        low=None,
    ),
    plot(
        "Step time by rank",
        f"max by (rank) (elasticd_rank_step_seconds{{{J}}})",
        "rank {{rank}}",
        "Waiting for the others included.",
        unit="s",
    ),
    plot(
        "Sent for gradients by rank",
        f"max by (rank) (rate(elasticd_rank_sent_bytes_total{{{J}}}{RATE}))",
        "rank {{rank}}",
        "Counted from the sizes of what is averaged over ranks, after compression.",
        unit="Bps",
    ),
    plot(
        "Share of the step spent waiting",
        f"sum by (rank) (rate(elasticd_rank_wait_seconds_total{{{J}}}{RATE}))"
        f" / (sum by (rank) (rate(elasticd_rank_wait_seconds_total{{{J}}}{RATE}))"
        f" + sum by (rank) (rate(elasticd_rank_busy_seconds_total{{{J}}}{RATE})))",
        "rank {{rank}}",
        "The rank that waits least is the slow one.",
        unit="percentunit",
        high=1,
    ),
    lines(
        "Imbalance",
        {
            "all ranks (5 min)": f"job_id:elasticd_imbalance:ratio_rate5m{{{J}}}",
            "{{node}}, now": f"max by (node) (elasticd_job_imbalance_ratio{{{J}}})",
        },
        "The slowest over the mean of the busy time per step: 1.0 is perfect, 1.2 costs a sixth of the fleet.",
        low=1,
    ),
    plot(
        "Slowdown by node",
        f"max by (node) (elasticd_job_slowdown_ratio{{{J}}})",
        "{{node}}",
        "Its slowest rank over the median of all ranks. Above the job's straggler_factor for long, it is exchanged.",
        low=1,
    ),
    lines(
        "World",
        {
            "nodes": f"max(elasticd_job_nodes{{{J}}})",
            "nodes, spares included": f"max(elasticd_job_members{{{J}}})",
            "minimum": f"max(elasticd_job_min_nodes{{{J}}})",
            "maximum": f"max(elasticd_job_max_nodes{{{J}}})",
        },
        "Nodes that compute, and those that could.",
    ),
    plot(
        "Restarts by cause",
        f"max by (cause) (elasticd_job_restarts_total{{{J}}})",
        "{{cause}}",
        "Since the job's start. Only worker_failed is charged to the script.",
    ),
    plot(
        "Recovery",
        f"sum by (cause, until) (elasticd_recovery_seconds_sum{{{J}}})"
        f" / sum by (cause, until) (elasticd_recovery_seconds_count{{{J}}})",
        "{{cause}}, until {{until}}",
        "Mean from the first evidence until the workers ran again, and until they completed a step.",
        unit="s",
    ),
    plot(
        "Who has a seat",
        f"max by (node) (elasticd_job_seated{{{J}}})",
        "{{node}}",
        "A spare is warm, and in no world.",
        kind="state-timeline",
        names={0: "spare", 1: "seated"},
    ),
    plot(
        "Who hosts the rendezvous store",
        f"max by (node) (elasticd_job_store_host{{{J}}})",
        "{{node}}",
        "Any node may: a new round has a new store.",
        kind="state-timeline",
        names={0: " ", 1: "host"},
    ),
    lines(
        "Checkpoints",
        {
            "completed step": f"max(elasticd_job_step{{{J}}})",
            "committed step": f"max(elasticd_checkpoint_step{{{J}}})",
        },
        "The distance is what a restart would repeat.",
    ),
    plot(
        "Checkpoint commits",
        f"sum by (result) (elasticd_checkpoint_commits_total{{{J}}})",
        "{{result}}",
        "Refused: it came from a round that was over.",
    ),
    lines(
        "Copies in RAM",
        {
            "completed step": f"max(elasticd_job_step{{{J}}})",
            "newest whole copy": f"max(elasticd_memory_copy_step{{{J}}})",
        },
        "The distance is what a lost worker or node costs: Session(memory_every_steps=...).",
    ),
    plot(
        "Memory that copies take",
        "sum by (node, origin) (elasticd_memory_held_bytes)",
        "{{node}}: {{origin}}",
        "Own: of this node's workers. Copied: kept for other nodes.",
        unit="bytes",
    ),
    plot(
        "Copying to the buddy",
        f"sum by (node) (elasticd_memory_sent_bytes_total{{{J}}})"
        f" / (sum by (node) (elasticd_memory_send_seconds_sum{{{J}}}) > 0)",
        "{{node}}",
        "Bytes a second while a copy is under way, checking it included; the mean since the job came.",
        unit="Bps",
    ),
    plot(
        "State taken up from",
        f"sum by (source) (elasticd_restores_total{{{J}}})",
        "{{source}}",
        "Memory: of the nodes that wrote it. Buddy: one of those was gone. Disk: a checkpoint. By rank.",
    ),
    plot(
        "Parts of checkpoints",
        f"sum by (result) (increase(elasticd_checkpoint_saves_total{{{J}}}[5m]))",
        "{{result}}",
        "Each rank saves its part; one that fails fails the checkpoint. In five minutes.",
    ),
    plot(
        "Bandwidth of a save",
        f"sum by (node) (rate(elasticd_checkpoint_written_bytes_total{{{J}}}[5m]))"
        f" / (sum by (node) (rate(elasticd_checkpoint_save_seconds_sum{{{J}}}[5m])) > 0)",
        "{{node}}",
        "Bytes of a rank's part over the seconds from the copy until it was durable, mean over ranks.",
        unit="Bps",
    ),
    plot(
        "Seconds of a save",
        f"sum by (node) (rate(elasticd_checkpoint_save_seconds_sum{{{J}}}[5m]))"
        f" / (sum by (node) (rate(elasticd_checkpoint_save_seconds_count{{{J}}}[5m])) > 0)",
        "{{node}}",
        "From the copy of the state until the checkpoint was durable.",
        unit="s",
    ),
    plot(
        "Written to checkpoints",
        f"sum by (node) (increase(elasticd_checkpoint_written_bytes_total{{{J}}}[5m]))",
        "{{node}}",
        "In five minutes.",
        unit="bytes",
    ),
    plot(
        "Steps that wait for checkpoints",
        f"sum by (node) (rate(elasticd_checkpoint_stall_seconds_total{{{J}}}[5m]))",
        "{{node}}",
        "Seconds of stall a second, over the node's ranks.",
        unit="percentunit",
    ),
    plot(
        "Checkpoints that do not verify",
        f"sum by (node) (elasticd_checkpoint_damaged_total{{{J}}})",
        "{{node}}",
        "Passed over by a restore: damaged, or published by a round that was over.",
    ),
    plot(
        "Rounds proposed",
        f"sum by (node, cause) (elasticd_rounds_proposed_total{{{J}}})",
        "{{node}}: {{cause}}",
        "In calm times the oldest live node proposes.",
    ),
    plot(
        "Failures of workers",
        f"sum by (node) (elasticd_worker_failures_total{{{J}}})",
        "{{node}}",
        "Collectives that failed because a node was lost are among them.",
    ),
)

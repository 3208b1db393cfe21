"""Every metric of elasticd: its name, type, labels and help. The one place to look one up, or to add one.

Names follow Prometheus: base units, the unit last (before ``_total``). Labels are bounded, and none grows with time:
the number of a round is a value. Which node a sample is from, the scraper knows (``/sd`` names it). A job is called
``job_id``, since ``job`` is the scraper's own word and would be renamed on the way in.

Not here: where the values come from.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

#: A sample of the process's start time says the same, once.
disable_created_metrics()  # type: ignore[no-untyped-call]

UNITS = ("seconds", "bytes", "ratio", "celsius", "watts")
JOB = ("job_id",)
RANK = ("job_id", "rank")
#: From a refused reconnect (1 ms) to a store's lease that ran out.
DETECTION_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0)
#: From a recovery without a restart to a job that waited for a node.
RECOVERY_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
#: From a small model on a local disk to a large one on a busy shared file system.
SAVE_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)


#: From a small model on the same machine to a large one over a busy network.
COPY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Definition:
    """``family`` starts a set of samples to be filled at a scrape; ``instrument`` is kept, and told what happens."""

    name: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        last = self.name.removesuffix("_total").rsplit("_", 1)[-1]
        return last if last in UNITS else ""


@dataclass(frozen=True, slots=True)
class GaugeDefinition(Definition):
    def family(self) -> GaugeMetricFamily:
        return GaugeMetricFamily(self.name, self.help, labels=self.labels, unit=self.unit)

    def of(self, value: float, *labels: str) -> GaugeMetricFamily:
        """A family of one sample."""
        family = self.family()
        family.add_metric(labels, value)
        return family


@dataclass(frozen=True, slots=True)
class CounterDefinition(Definition):
    def family(self) -> CounterMetricFamily:
        return CounterMetricFamily(self.name, self.help, labels=self.labels, unit=self.unit)

    def of(self, value: float, *labels: str) -> CounterMetricFamily:
        """A family of one sample."""
        family = self.family()
        family.add_metric(labels, value)
        return family

    def instrument(self, registry: CollectorRegistry) -> Counter:
        return Counter(self.name, self.help, self.labels, unit=self.unit, registry=registry)


@dataclass(frozen=True, slots=True)
class HistogramDefinition(Definition):
    buckets: tuple[float, ...] = Histogram.DEFAULT_BUCKETS

    def instrument(self, registry: CollectorRegistry) -> Histogram:
        return Histogram(self.name, self.help, self.labels, unit=self.unit, registry=registry, buckets=self.buckets)


# --- The daemon -----------------------------------------------------------------------------------

BUILD_INFO = GaugeDefinition("elasticd_build_info", "Versions, as labels; always 1.", ("version", "torch", "python"))
PROCESS_CPU = CounterDefinition("elasticd_process_cpu_seconds_total", "CPU time of the daemon, without its children.")
PROCESS_MEMORY = GaugeDefinition("elasticd_process_resident_memory_bytes", "Resident memory of the daemon.")
PROCESS_START = GaugeDefinition("elasticd_process_start_time_seconds", "When the daemon started, in Unix time.")
LOOP_DELAY = GaugeDefinition("elasticd_loop_delay_seconds", "How long the daemon's loop took to answer this scrape.")
REGISTERED = GaugeDefinition("elasticd_registered", "1 while this node's key of this life stands in etcd.")
LEAVING = GaugeDefinition("elasticd_leaving", "1 while this node is drained, or shuts down.")
GPU_TROUBLE = GaugeDefinition(
    "elasticd_gpu_trouble", "1 while a GPU of this node is sick; the node takes no job until its daemon starts anew."
)
STAGE = GaugeDefinition("elasticd_stage", "1 for the stage that this node is in, 0 for the others.", ("stage",))
CLUSTER_NODES = GaugeDefinition("elasticd_cluster_nodes", "Nodes registered in etcd, as this node sees it.")
CLUSTER_JOBS = GaugeDefinition("elasticd_cluster_jobs", "Jobs in etcd by phase, as this node sees it.", ("phase",))
QUARANTINED = GaugeDefinition("elasticd_cluster_quarantined_nodes", "Nodes in quarantine, as this node sees it.")
EVICTIONS = GaugeDefinition(
    "elasticd_cluster_evictions",
    "Nodes that lost their seats within the budget's window, by grounds, as this node sees it.",
    ("grounds",),
)
EVICTION_BUDGET = GaugeDefinition(
    "elasticd_cluster_eviction_budget", "How many nodes may lose their seats within the window, by this node's file."
)
PEERS = GaugeDefinition("elasticd_peers", "Links to other daemons by state.", ("state",))

# --- etcd -----------------------------------------------------------------------------------------

STORE_UP = GaugeDefinition("elasticd_store_up", "1 while etcd answers this node.")
STORE_AGE = GaugeDefinition("elasticd_store_last_answer_age_seconds", "Since etcd last answered this node.")
STORE_OUTAGES = CounterDefinition("elasticd_store_outages_total", "Times that etcd stopped answering this node.")
LEASES_LOST = CounterDefinition("elasticd_leases_lost_total", "Times that this node's lease in etcd ran out.")

# --- The job and its world ------------------------------------------------------------------------

ROUND = GaugeDefinition("elasticd_job_round", "Number of the job's newest round.", JOB)
WORLD_SIZE = GaugeDefinition("elasticd_job_world_size", "Ranks of the newest round; 0 while it waits for nodes.", JOB)
SEATS = GaugeDefinition("elasticd_job_nodes", "Nodes of the newest round.", JOB)
MEMBERS = GaugeDefinition("elasticd_job_members", "Nodes that take part in the job, spares included.", JOB)
MIN_NODES = GaugeDefinition("elasticd_job_min_nodes", "The fewest nodes that the job runs on.", JOB)
MAX_NODES = GaugeDefinition("elasticd_job_max_nodes", "The most nodes that the job runs on.", JOB)
SEATED = GaugeDefinition("elasticd_job_seated", "1 when this node has a seat in the newest round, 0 as a spare.", JOB)
STORE_HOST = GaugeDefinition("elasticd_job_store_host", "1 when this node hosts the workers' rendezvous store.", JOB)
RESTARTS = CounterDefinition("elasticd_job_restarts_total", "Restarts since the job's start.", (*JOB, "cause"))
BUDGET = GaugeDefinition("elasticd_job_restart_budget", "Restarts by worker_failed that the job may have.", JOB)
PROPOSED = CounterDefinition("elasticd_rounds_proposed_total", "Rounds that this node proposed.", (*JOB, "cause"))
WORKER_FAILURES = CounterDefinition("elasticd_worker_failures_total", "Failures of this node's workers.", JOB)

# --- Faults ---------------------------------------------------------------------------------------

DETECTION = HistogramDefinition(
    "elasticd_detection_seconds",
    "Since the lost one was last heard, when its loss was known: a peer by its heartbeats (refused, silent), "
    "a worker by the reports of its steps (worker_exit).",
    ("how",),
    DETECTION_BUCKETS_S,
)
RECOVERY = HistogramDefinition(
    "elasticd_recovery_seconds",
    "From the first evidence of a change of the world until this node's workers ran again (until=workers), "
    "and until they completed a step (until=step).",
    (*JOB, "cause", "until"),
    RECOVERY_BUCKETS_S,
)

# --- Training, as reported by scripts that use a Session ------------------------------------------

RANK_STEP = GaugeDefinition("elasticd_rank_step_seconds", "Duration of the rank's latest steps, as a mean.", RANK)
RANK_STEPS = CounterDefinition("elasticd_rank_steps_total", "Steps that the rank completed here.", RANK)
RANK_SAMPLES = CounterDefinition("elasticd_rank_samples_total", "Samples that the rank trained on here.", RANK)
RANK_SENT = CounterDefinition(
    "elasticd_rank_sent_bytes_total",
    "Bytes that the rank sent for gradients, counted from the sizes of messages or parameters, as in a ring of ranks.",
    RANK,
)
RANK_BUSY = CounterDefinition("elasticd_rank_busy_seconds_total", "Time in steps, waiting left out.", RANK)
RANK_WAIT = CounterDefinition("elasticd_rank_wait_seconds_total", "Time in steps spent waiting for other ranks.", RANK)
IMBALANCE = GaugeDefinition(
    "elasticd_job_imbalance_ratio",
    "The slowest over the mean of the busy seconds of this node's ranks in their latest steps.",
    JOB,
)
SLOWDOWN = GaugeDefinition(
    "elasticd_job_slowdown_ratio",
    "This node's slowest rank over the median of the world's ranks, by seconds per micro-batch (or busy seconds per "
    "step): 1.0 is as fast as most.",
    JOB,
)
STEP = GaugeDefinition("elasticd_job_step", "The newest completed step that this node's ranks reported.", JOB)
LAST_STEP = GaugeDefinition(
    "elasticd_job_last_step_timestamp_seconds", "When a rank of this node last reported a step, in Unix time.", JOB
)
SCRIPT_METRIC = GaugeDefinition(
    "elasticd_job_metric",
    "What the script reported last by step.report(), from this node's first rank.",
    (*JOB, "name"),
)

# --- Checkpoints ----------------------------------------------------------------------------------

CHECKPOINT_STEP = GaugeDefinition("elasticd_checkpoint_step", "Step of the checkpoint last committed here.", JOB)
CHECKPOINT_COMMITS = CounterDefinition(
    "elasticd_checkpoint_commits_total", "Checkpoints that this node asked to commit.", (*JOB, "result")
)
CHECKPOINT_AT = GaugeDefinition(
    "elasticd_checkpoint_last_commit_timestamp_seconds",
    "When a checkpoint was last committed here, in Unix time.",
    JOB,
)
CHECKPOINT_SAVES = CounterDefinition(
    "elasticd_checkpoint_saves_total",
    "Parts of checkpoints that this node's ranks saved, or failed to.",
    (*JOB, "result"),
)
CHECKPOINT_BYTES = CounterDefinition("elasticd_checkpoint_written_bytes_total", "Written by this node's ranks.", JOB)
CHECKPOINT_SECONDS = HistogramDefinition(
    "elasticd_checkpoint_save_seconds",
    "From the copy of the state until the checkpoint was durable, by rank and save.",
    JOB,
    SAVE_BUCKETS_S,
)
CHECKPOINT_STALL = CounterDefinition(
    "elasticd_checkpoint_stall_seconds_total", "For how long steps of this node's ranks waited for checkpoints.", JOB
)
CHECKPOINT_WAITS = CounterDefinition(
    "elasticd_checkpoint_waits_total",
    "Saves that were due while one was under way, and waited for it: the disk is too slow for the interval.",
    JOB,
)
CHECKPOINT_DAMAGED = CounterDefinition(
    "elasticd_checkpoint_damaged_total", "Checkpoints that this node's first rank passed over when it restored.", JOB
)

# --- Copies in RAM --------------------------------------------------------------------------------

MEMORY_COPIES = CounterDefinition(
    "elasticd_memory_copies_total",
    "Copies in RAM that this node's ranks took part in: committed, or void and left out.",
    (*JOB, "result"),
)
MEMORY_STEP = GaugeDefinition("elasticd_memory_copy_step", "Step of the newest whole copy in RAM.", JOB)
MEMORY_AT = GaugeDefinition(
    "elasticd_memory_copy_timestamp_seconds", "When the newest copy in RAM became whole, in Unix time.", JOB
)
MEMORY_AT_BUDDY = GaugeDefinition(
    "elasticd_memory_at_buddy", "1 while another node keeps this node's parts of the newest copy too.", JOB
)
MEMORY_STALL = CounterDefinition(
    "elasticd_memory_stall_seconds_total", "For how long steps of this node's ranks waited for copies in RAM.", JOB
)
MEMORY_REFUSALS = CounterDefinition(
    "elasticd_memory_refusals_total", "Copies in RAM that were refused since they did not fit on this node.", JOB
)
MEMORY_SENT = CounterDefinition("elasticd_memory_sent_bytes_total", "Copied to a buddy's memory.", JOB)
MEMORY_SEND_SECONDS = HistogramDefinition(
    "elasticd_memory_send_seconds",
    "How long it took until a buddy had this node's parts of a copy, and had checked them.",
    JOB,
    COPY_BUCKETS_S,
)
MEMORY_HELD = GaugeDefinition(
    "elasticd_memory_held_bytes", "Shared memory that copies take here: own ones, and other nodes'.", ("origin",)
)
MEMORY_LIMIT = GaugeDefinition("elasticd_memory_limit_bytes", "Shared memory that copies may take here.")
RESTORES = CounterDefinition(
    "elasticd_restores_total",
    "Times that this node's ranks took their state up again: from the memory of the nodes that wrote it, from a "
    "buddy's since one of those is gone, or from disk.",
    (*JOB, "source"),
)
RESTORE_SECONDS = HistogramDefinition(
    "elasticd_restore_seconds",
    "How long it took to take the state up again, by rank.",
    (*JOB, "source"),
    COPY_BUCKETS_S,
)

# --- Scrubs: a command from a timer leaves its figures in a file (scrubbing.py) --------------------

DIRECTORY = ("directory",)
SCRUB_AT = GaugeDefinition(
    "elasticd_scrub_last_timestamp_seconds", "When the checkpoints were last read through, in Unix time.", DIRECTORY
)
SCRUB_CHECKED = GaugeDefinition("elasticd_scrub_checkpoints", "How many the last scrub has read.", DIRECTORY)
SCRUB_DAMAGED = GaugeDefinition("elasticd_scrub_damaged_checkpoints", "How many of them are damaged.", DIRECTORY)
SCRUB_BYTES = GaugeDefinition("elasticd_scrub_read_bytes", "What of them was read and is whole.", DIRECTORY)
SCRUB_SECONDS = GaugeDefinition("elasticd_scrub_duration_seconds", "How long that took.", DIRECTORY)

# --- The node -------------------------------------------------------------------------------------

CPUS = GaugeDefinition("elasticd_node_cpus", "CPUs that this node offers.")
CPU = CounterDefinition("elasticd_node_cpu_seconds_total", "CPU time of the whole machine by mode.", ("mode",))
LOAD = GaugeDefinition("elasticd_node_load_average", "Load average by window.", ("window",))
MEMORY = GaugeDefinition("elasticd_node_memory_bytes", "Memory of the machine.")
MEMORY_FREE = GaugeDefinition("elasticd_node_memory_available_bytes", "Memory that programs can still get.")
DISK_READ = CounterDefinition("elasticd_node_disk_read_bytes_total", "Read from the machine's disks.")
DISK_WRITTEN = CounterDefinition("elasticd_node_disk_written_bytes_total", "Written to the machine's disks.")
FILES = GaugeDefinition("elasticd_node_filesystem_bytes", "Size of the file system under a path.", ("path",))
FILES_FREE = GaugeDefinition("elasticd_node_filesystem_available_bytes", "Space left for programs.", ("path",))
RECEIVED = CounterDefinition("elasticd_node_network_received_bytes_total", "Received by interface.", ("interface",))
SENT = CounterDefinition("elasticd_node_network_sent_bytes_total", "Sent by interface.", ("interface",))
NETWORK_ERRORS = CounterDefinition(
    "elasticd_node_network_errors_total", "Errors and drops by interface, both ways.", ("interface",)
)

# --- GPUs, where NVML finds any -------------------------------------------------------------------

GPU = ("gpu",)
GPU_INFO = GaugeDefinition("elasticd_gpu_info", "Name and UUID, as labels; always 1.", (*GPU, "name", "uuid"))
GPU_UP = GaugeDefinition("elasticd_gpu_up", "1 while the GPU answers NVML, 0 when it is lost.", GPU)
GPU_AGE = GaugeDefinition("elasticd_gpu_sample_age_seconds", "Since NVML last answered; it hangs with a sick GPU.")
GPU_BUSY = GaugeDefinition("elasticd_gpu_utilization_ratio", "Share of time that a kernel ran.", GPU)
GPU_MEMORY = GaugeDefinition("elasticd_gpu_memory_bytes", "Memory of the GPU.", GPU)
GPU_MEMORY_USED = GaugeDefinition("elasticd_gpu_memory_used_bytes", "Memory in use.", GPU)
GPU_TEMPERATURE = GaugeDefinition("elasticd_gpu_temperature_celsius", "Temperature of the GPU.", GPU)
GPU_POWER = GaugeDefinition("elasticd_gpu_power_watts", "Power drawn.", GPU)
GPU_ECC = CounterDefinition(
    "elasticd_gpu_ecc_errors_total", "ECC errors since the driver was loaded, by kind.", (*GPU, "kind")
)

ALL: tuple[Definition, ...] = tuple(value for value in globals().values() if isinstance(value, Definition))

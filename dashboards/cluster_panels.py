"""The fleet as a whole, and each node of it: the machine, the daemon, the GPUs."""

from __future__ import annotations

from panel import RATE, N, Panel, lines, plot, stat

FLEET = (
    stat("Nodes in etcd", "max(elasticd_cluster_nodes)", "Daemons that hold their key."),
    stat("Nodes that report", "count(elasticd_build_info)", "Daemons that Prometheus scrapes."),
    stat("Nodes in a world", "sum(elasticd_job_seated)", "Nodes whose workers are in the current round of a job."),
    stat("Jobs running", 'max(elasticd_cluster_jobs{phase="running"})', "Jobs whose newest round runs."),
    stat(
        "etcd answers",
        "avg(elasticd_store_up)",
        "Share of the nodes that etcd answers. Training goes on without it; changes of the world wait.",
        unit="percentunit",
        high=1,
    ),
    stat("Versions", "count(count by (version) (elasticd_build_info))", "Different versions of elasticd."),
    plot(
        "Nodes by stage",
        "sum by (stage) (elasticd_stage)",
        "{{stage}}",
        "What each node does for its job.",
        stacked=True,
    ),
    plot(
        "Since etcd last answered",
        "max by (node) (elasticd_store_last_answer_age_seconds)",
        "{{node}}",
        "Normally under a third of the lease's time to live.",
        unit="s",
    ),
    lines(
        "Evictions",
        {
            "{{grounds}}, within the window": "max by (grounds) (elasticd_cluster_evictions)",
            "budget": "max(elasticd_cluster_eviction_budget)",
            "nodes in quarantine": "max(elasticd_cluster_quarantined_nodes)",
        },
        "Nodes that lost their seats: because they were slow for long, or a GPU was in trouble.",
    ),
    plot("Links between daemons", "sum by (state) (elasticd_peers)", "{{state}}", "Each link is seen from both ends."),
    plot(
        "Time to detect a loss",
        "sum by (how) (elasticd_detection_seconds_sum) / (sum by (how) (elasticd_detection_seconds_count) > 0)",
        "{{how}}",
        "Mean since the daemons started, by the evidence: refused connections are fast, silence takes the deadline.",
        unit="s",
    ),
    plot(
        "Losses detected",
        "sum by (how) (elasticd_detection_seconds_count)",
        "{{how}}",
        "Since the daemons started. A lost node counts on each of its neighbours.",
    ),
    Panel(
        title="What each node does",
        queries={"": "max by (node, zone, rack, stage) (elasticd_stage == 1)"},
        about="Node, where it stands, stage.",
        kind="table",
    ),
)

NODE = (
    plot(
        "CPU",
        f'1 - sum by (node) (rate(elasticd_node_cpu_seconds_total{{{N},mode="idle"}}{RATE}))'
        f" / sum by (node) (rate(elasticd_node_cpu_seconds_total{{{N}}}{RATE}))",
        "{{node}}",
        "Share of the machine's CPU time that was not idle.",
        unit="percentunit",
        high=1,
    ),
    plot(
        "Load per CPU",
        f'sum by (node) (elasticd_node_load_average{{{N},window="1m"}}) / sum by (node) (elasticd_node_cpus{{{N}}})',
        "{{node}}",
        "Over one minute.",
    ),
    plot(
        "Memory",
        f"1 - sum by (node) (elasticd_node_memory_available_bytes{{{N}}})"
        f" / sum by (node) (elasticd_node_memory_bytes{{{N}}})",
        "{{node}}",
        "Share that programs cannot get any more.",
        unit="percentunit",
        high=1,
    ),
    lines(
        "Network",
        {
            "{{node}} {{interface}} in": "sum by (node, interface) "
            f"(rate(elasticd_node_network_received_bytes_total{{{N}}}{RATE}))",
            "{{node}} {{interface}} out": "sum by (node, interface) "
            f"(rate(elasticd_node_network_sent_bytes_total{{{N}}}{RATE}))",
        },
        "The machine's own interfaces.",
        unit="Bps",
    ),
    plot(
        "Network errors",
        f"sum by (node, interface) (rate(elasticd_node_network_errors_total{{{N}}}{RATE}))",
        "{{node}} {{interface}}",
        "Errors and drops, both ways.",
        unit="ops",
    ),
    lines(
        "Disk",
        {
            "{{node}} read": f"sum by (node) (rate(elasticd_node_disk_read_bytes_total{{{N}}}{RATE}))",
            "{{node}} written": f"sum by (node) (rate(elasticd_node_disk_written_bytes_total{{{N}}}{RATE}))",
        },
        "All disks of the machine.",
        unit="Bps",
    ),
    plot(
        "File systems",
        f"1 - sum by (node, path) (elasticd_node_filesystem_available_bytes{{{N}}})"
        f" / sum by (node, path) (elasticd_node_filesystem_bytes{{{N}}})",
        "{{node}} {{path}}",
        "Share in use, under the paths that the daemon writes to.",
        unit="percentunit",
        high=1,
    ),
    lines(
        "The daemon",
        {
            "{{node}} CPU": f"sum by (node) (rate(elasticd_process_cpu_seconds_total{{{N}}}{RATE}))",
            "{{node}} loop's delay (s)": f"max by (node) (elasticd_loop_delay_seconds{{{N}}})",
        },
        "Share of one CPU, and how long the loop took to answer the scrape.",
        unit="none",
    ),
    plot(
        "The daemon's memory",
        f"max by (node) (elasticd_process_resident_memory_bytes{{{N}}})",
        "{{node}}",
        "Without its warm server and the workers.",
        unit="bytes",
    ),
    plot(
        "GPU use",
        f"max by (node, gpu) (elasticd_gpu_utilization_ratio{{{N}}})",
        "{{node}} GPU {{gpu}}",
        "Share of time in which a kernel ran.",
        unit="percentunit",
        high=1,
    ),
    plot(
        "GPU memory",
        f"sum by (node, gpu) (elasticd_gpu_memory_used_bytes{{{N}}})"
        f" / sum by (node, gpu) (elasticd_gpu_memory_bytes{{{N}}})",
        "{{node}} GPU {{gpu}}",
        "Share in use.",
        unit="percentunit",
        high=1,
    ),
    plot(
        "GPU temperature",
        f"max by (node, gpu) (elasticd_gpu_temperature_celsius{{{N}}})",
        "{{node}} GPU {{gpu}}",
        "The chip.",
        unit="celsius",
    ),
    plot(
        "GPU power",
        f"max by (node, gpu) (elasticd_gpu_power_watts{{{N}}})",
        "{{node}} GPU {{gpu}}",
        "Drawn now.",
        unit="watt",
    ),
    plot(
        "GPU ECC errors",
        f"sum by (node, gpu, kind) (elasticd_gpu_ecc_errors_total{{{N}}})",
        "{{node}} GPU {{gpu}} {{kind}}",
        "Since the driver was loaded. Uncorrected ones end the process that used the memory.",
    ),
    plot(
        "GPUs that answer",
        f"min by (node, gpu) (elasticd_gpu_up{{{N}}})",
        "{{node}} GPU {{gpu}}",
        "A GPU that is lost needs a reset, or the node a reboot.",
        kind="state-timeline",
        names={0: "lost", 1: "up"},
    ),
)

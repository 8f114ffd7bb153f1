"""Every metric of the node, named and described in one place, on prometheus-client.

One `Metrics` belongs to one node and its registry, so that two nodes in one process (tests) do not
meet.
"""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # fmt: skip


class Metrics:
    """The node's counters, gauges and histograms; names begin with `sllm_`."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._loads()
        self._requests()
        self._gauges()
        self._cluster()

    def _loads(self) -> None:
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.loads = counter("sllm_loads", "Loads by source tier and result", ["source", "result"])
        self.load_seconds = histogram(
            "sllm_load_seconds",
            "Load time by source tier",
            ["source"],
            buckets=LATENCY_BUCKETS_S,
        )
        self.load_bytes = counter(
            "sllm_load_bytes", "Bytes delivered to the device by source tier", ["source"]
        )
        self.load_stored_bytes = counter(
            "sllm_load_stored_bytes", "Bytes carried to devices, as they are stored: encoded"
        )
        self.decode_seconds = counter(
            "sllm_decode_seconds", "Time that devices spent decoding weights"
        )
        self.first_copy_seconds = histogram(
            "sllm_load_first_copy_seconds",
            "Load asked for to first chunk copy",
            buckets=LATENCY_BUCKETS_S,
        )
        self.evictions = counter(
            "sllm_evictions", "Models evicted by tier and reason", ["tier", "reason"]
        )
        self.checksum_failures = counter(
            "sllm_checksum_failures", "Chunks whose checksum was wrong"
        )
        self.remote_bytes = counter(
            "sllm_remote_bytes", "Bytes of weights that a remote sent", ["remote"]
        )
        self.remote_retries = counter(
            "sllm_remote_retries", "Requests to a remote that were made again", ["remote"]
        )
        self.remote_failures = counter(
            "sllm_remote_failures", "What a remote did not give, by reason", ["remote", "reason"]
        )
        self.files_received_bytes = counter(
            "sllm_peer_files_received_bytes", "Bytes of checkpoints that a peer sent", ["peer"]
        )
        self.files_sent_bytes = counter(
            "sllm_peer_files_sent_bytes", "Bytes of checkpoints sent to peers"
        )
        self.files_refused = counter(
            "sllm_peer_files_refused", "Ranges that peers asked for and did not get", ["reason"]
        )

    def _requests(self) -> None:
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter(
            "sllm_requests", "HTTP requests by route and status", ["route", "status"]
        )
        self.sessions = counter(
            "sllm_sessions", "Sessions by model and how they ended", ["model", "outcome"]
        )
        self.prompt_tokens = counter("sllm_prompt_tokens", "Prompt tokens taken", ["model"])
        self.generated_tokens = counter("sllm_generated_tokens", "Tokens generated", ["model"])
        self.ttft_seconds = histogram(
            "sllm_time_to_first_token_seconds",
            "Request accepted to first token",
            ["model"],
            buckets=LATENCY_BUCKETS_S,
        )
        self.inter_token_seconds = histogram(
            "sllm_inter_token_seconds",
            "Time between two tokens of a session",
            ["model"],
            buckets=LATENCY_BUCKETS_S,
        )
        self.step_wait_seconds = histogram(
            "sllm_step_wait_seconds",
            "Step ready to begun: the time in which steps of other models went before it",
            ["model"],
            buckets=(0.0005, *LATENCY_BUCKETS_S),
        )
        self.queue_seconds = histogram(
            "sllm_queue_seconds",
            "Request accepted to granted",
            ["model"],
            buckets=LATENCY_BUCKETS_S,
        )
        self.prefix_cache_queries = counter(
            "sllm_prefix_cache_queries", "Tokens looked up in the prefix cache", ["model"]
        )
        self.prefix_cache_hits = counter(
            "sllm_prefix_cache_hits", "Tokens found in the prefix cache", ["model"]
        )
        self.preemptions = counter(
            "sllm_preemptions", "Sessions set back for want of KV blocks", ["model"]
        )
        self.graph_failures = counter(
            "sllm_graph_failures", "Kinds of steps that could not be captured as graphs", ["device"]
        )

    def _gauges(self) -> None:
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.num_requests_waiting = gauge(
            "sllm_num_requests_waiting", "Requests waiting", ["model"]
        )
        self.num_requests_running = gauge(
            "sllm_num_requests_running", "Requests being served", ["model"]
        )
        self.kv_cache_usage_perc = gauge(
            "sllm_kv_cache_usage_perc", "KV blocks in use, 0 to 1", ["model"]
        )
        self.engine_stalled = gauge(
            "sllm_engine_stalled", "1 while an engine has work and no step ends", ["model"]
        )
        self.pool_chunks = gauge(
            "sllm_pool_chunks", "Chunks of the pinned pool by state", ["state"]
        )
        self.device_bytes = gauge(
            "sllm_device_bytes", "Device memory by state", ["device", "state"]
        )
        self.tier_bandwidth = gauge(
            "sllm_tier_bandwidth_bytes_per_second",
            "Observed bandwidth into the device by source tier",
            ["source"],
        )
        self.loop_lag_seconds = histogram(
            "sllm_event_loop_lag_seconds",
            "How late the event loop runs a timer",
            buckets=(0.0005, *LATENCY_BUCKETS_S),
        )
        self.journals_set_aside = Counter(
            "sllm_journals_set_aside",
            "Journals found damaged at start: pins and the like are to be set again",
            registry=self.registry,
        )
        self.ready = gauge("sllm_ready", "1 while the node takes requests")

    def _cluster(self) -> None:
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.peers_alive = Gauge(
            "sllm_peers_alive", "Other nodes that requests are placed at", registry=self.registry
        )
        self.heartbeats = counter(
            "sllm_heartbeats", "Heartbeats by what became of them", ["result"]
        )
        self.peer_round_trip_seconds = histogram(
            "sllm_peer_round_trip_seconds",
            "Heartbeat sent to taken: a forwarded token comes later by half of it",
            ["peer"],
            buckets=(0.0005, *LATENCY_BUCKETS_S),
        )
        self.cluster_reloads = counter(
            "sllm_cluster_reloads", "Changed cluster files by result", ["result"]
        )
        self.messages_refused = counter(
            "sllm_peer_messages_refused", "Messages of peers not taken, by reason", ["reason"]
        )
        self.placements = counter(
            "sllm_placements",
            "Requests placed, by way and whether on this node",
            ["way", "where"],
        )
        self.forward_added_seconds = histogram(
            "sllm_forward_added_seconds",
            "Tokens of a peer come, to written to the client: what passing them on adds on this node",
            ["peer"],
            buckets=(0.0001, 0.0002, 0.0005, *LATENCY_BUCKETS_S),
        )
        self.hints = counter(
            "sllm_hints",
            "Loads begun while a request becomes tokens: followed by its session, or not; gave way to others; or no room",
            ["outcome"],
        )
        self.forwards = counter(
            "sllm_forwards", "Sessions passed on to peers, by peer and outcome", ["peer", "outcome"]
        )
        self.resumptions = counter(
            "sllm_resumptions", "Sessions that went on elsewhere after their node failed", ["model"]
        )
        self.replicas = Gauge(
            "sllm_replicas",
            "Replicas of a scaled model by state (wanted, ready, starting, leaving), as this node sees them",
            ["model", "state"],
            registry=self.registry,
        )
        self.directory_followed = Gauge(
            "sllm_directory_followed",
            "1 while the directory answers; 0: what is known of it last counts, or there is none",
            registry=self.registry,
        )
        self.directory_nodes = Gauge(
            "sllm_directory_nodes", "Other nodes that the directory lists", registry=self.registry
        )
        self.scalings = counter(
            "sllm_scalings",
            "Replicas that this node, as their model's home, started and retired, by result",
            ["action", "result"],
        )
        self.migrations = counter(
            "sllm_migrations",
            "Moves of running sessions by outcome and reason",
            ["outcome", "reason"],
        )
        self.migration_rounds = histogram(
            "sllm_migration_rounds",
            "Rounds of tokens until a session was handed over, the last one included",
            buckets=(1, 2, 3, 4, 6, 9),
        )
        self.migration_round_tokens = histogram(
            "sllm_migration_last_round_tokens",
            "Tokens that the destination lacked when it was handed a session",
            buckets=(0, 1, 2, 4, 8, 16, 32, 64, 128, 512),
        )
        self.migration_gap_seconds = histogram(
            "sllm_migration_gap_seconds",
            "Last token of the old node to first token of the new one, as the reader's node sees it",
            buckets=LATENCY_BUCKETS_S,
        )
        self.vacates = counter(
            "sllm_vacates",
            "Times that sessions were asked to leave this node for a model to start, by outcome",
            ["outcome"],
        )
        self.vacate_seconds = histogram(
            "sllm_vacate_seconds",
            "From when sessions were asked to leave until the model loaded",
            buckets=LATENCY_BUCKETS_S,
        )
        self.rebalanced = counter(
            "sllm_rebalanced",
            "Requests that waited here and were given back, as another node had a place",
            ["model"],
        )
        self.migration_bytes = counter(
            "sllm_migration_bytes", "Bytes sent to destinations of sessions that moved"
        )
        self.estimate_error_seconds = histogram(
            "sllm_startup_estimate_error_seconds",
            "Distance of the estimated startup time and the one that came, by where",
            ["where"],
            buckets=(0.0005, *LATENCY_BUCKETS_S),
        )

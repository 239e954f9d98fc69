"""A real Ray of several nodes on this machine: prints its address, adds a node for a line "add", ends with stdin.

Started by the journeys' fixture with RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 (every listener on 127.0.0.1) and a token.
"""

from __future__ import annotations

import json
import socket
import sys

from ray.cluster_utils import Cluster


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    port = free_port()
    head = {
        "num_cpus": 0,
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": port,
        "object_store_memory": 150_000_000,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=2, object_store_memory=150_000_000)
    cluster.wait_for_nodes()
    print(json.dumps({"address": cluster.address, "dashboard": f"http://127.0.0.1:{port}"}), flush=True)
    for line in sys.stdin:
        if line.strip() == "add":
            cluster.add_node(num_cpus=2, object_store_memory=150_000_000)
            print("added", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()

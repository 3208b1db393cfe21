"""Adapters between nodes: the store (etcd), and the links between daemons."""

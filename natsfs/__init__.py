"""A FUSE file system for NATS JetStream Object Store buckets."""

__version__ = "0.1.0"

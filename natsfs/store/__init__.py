"""Everything that knows NATS. `Store` is its face."""

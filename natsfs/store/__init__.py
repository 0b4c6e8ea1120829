"""Everything that knows NATS. `Store` is the face of this package for trio; the rest runs on asyncio."""

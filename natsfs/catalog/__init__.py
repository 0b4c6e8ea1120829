"""What a bucket holds, in memory: pure code without I/O, fed by the watcher and by this mount's own commits."""

"""Open files: what was written (overlay, spool), what is read (reader, chunk cache), and how it is committed."""

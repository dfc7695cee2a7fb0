"""Where a teacher's distribution comes from: a live model, a pool, a cache, a server."""

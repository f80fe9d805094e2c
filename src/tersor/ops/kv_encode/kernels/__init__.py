"""Device code of `kv_encode`."""

"""Device code of `kv_attention`."""

"""Device code of products with trellis codes."""

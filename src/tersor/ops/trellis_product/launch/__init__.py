"""Host side: what to launch, with what."""

"""From a model directory to a compressed one: one file a stage, named as its verb."""

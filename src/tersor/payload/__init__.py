"""What lies in a stored tensor: layouts, packed codes, groups, scales, row blocks."""

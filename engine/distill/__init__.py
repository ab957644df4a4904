"""Teachers' distributions: their formats, their alignment with traces, their cache."""

"""Serving without Ray: batching, admission, access, the wire formats. Imports neither Ray nor any flow."""

"""The HTTP gateway: jobs, uploads, voices, events, speech and the web studio."""

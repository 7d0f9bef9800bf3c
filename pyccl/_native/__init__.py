"""The border to the C core: owners of its handles, and nothing that decides."""

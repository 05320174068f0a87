from families import corpus, tok  # noqa: F401 - fixtures

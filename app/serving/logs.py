"""Log lines of the service's own processes: one format, to stderr, from where Ray collects them."""

import logging


def configure_logging(level: str) -> None:
    """Send the ``app`` and ``magcache_core`` loggers to stderr at ``level``; further calls change the level only."""
    for name in ("app", "magcache_core"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
            logger.addHandler(handler)
            logger.propagate = False

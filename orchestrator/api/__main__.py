"""`python -m orchestrator.api --home DIR --host HOST --port N`: serves until SIGTERM. `orc up` starts it."""

from __future__ import annotations

import argparse
import logging
from importlib import metadata
from pathlib import Path

import uvicorn

from orchestrator.api.routes import application
from orchestrator.config.redaction import url_passwords
from orchestrator.json_logs import keep_service_log
from orchestrator.stack import Stack

logger = logging.getLogger("orchestrator.api")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.api")
    parser.add_argument("--home", required=True, type=Path)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    arguments = parser.parse_args()
    stack = Stack.load(arguments.home)  # the database's address, whose password nobody shall read in a command line
    keep_service_log(
        "api",
        [arguments.home / "logs"],
        secrets=[*url_passwords(stack.database_url), *url_passwords(stack.redis_url)],
        components={"api"} & set(stack.debug.split(",")),
    )
    app = application(arguments.home, stack.database_url, version(), stack.redis_url)
    logger.info("serving", extra={"address": f"{arguments.host}:{arguments.port}", "version": version()})
    uvicorn.run(
        app, host=arguments.host, port=arguments.port,
        log_config=None, log_level="warning", access_log=False, server_header=False,
        loop="asyncio", http="h11", ws="none", lifespan="off", proxy_headers=False,
        limit_concurrency=64, timeout_keep_alive=15, timeout_graceful_shutdown=2,
    )  # fmt: skip


def version() -> str:
    try:
        return metadata.version("ray-orchestrator")
    except metadata.PackageNotFoundError:  # a checkout that was never installed
        return ""


if __name__ == "__main__":
    main()

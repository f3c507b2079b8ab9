"""Retrieval and answers over HTTP: `fastrag serve`.

    source     the folders that are served, and their content
    batching   requests that arrive together are computed together
    records    passages and answers as JSON, also for `fastrag ask`
    service    searches and answers, with an index that may be replaced while it is served
    metrics    counters for Prometheus
    limits     limits of body, time and concurrency
    app        routes, fields and OpenAPI document
    server     the process: port, signals, shutdown

Only `source`, `batching` and `records` work without the extra `serve`.
"""

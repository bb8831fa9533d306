"""Where a model meets a schedule and a cluster: mesh, stages, transport, exchange, optimizer, checkpoint."""

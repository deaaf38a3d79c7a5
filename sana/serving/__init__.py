"""Many requests, one model: dynamic batches behind the HTTP server and the demo page."""

"""The lab as a service: an HTTP API and a page, over one model, its ledger and its documents."""

"""From a source model to one of each domain, without labels."""

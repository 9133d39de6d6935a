"""Where keys and values live: tiers, tables, shadows, prefixes, switch transactions."""

//! The TOML config: schema, defaults, checks.

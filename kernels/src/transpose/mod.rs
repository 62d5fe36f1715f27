//! Out-of-place transposes.

//! Mixture of experts: gating and routing.
//!
//! `num_tokens` tokens choose `num_topk` experts each. An index of -1 means no expert, no row, or padding.
//!
//! The expanded buffer has one row for each choice that stays on this rank, grouped by expert in ascending order. Expert `e` owns rows
//! `expert_start[e]..expert_end[e]`, a multiple of the alignment; the used ones come first. [`get_fused_mapping()`] builds the index
//! tensors that say which row is which, [`expand_to_fused()`] fills the buffer with the tokens' rows, and [`reduce_fused()`] adds a token's rows up again.

pub mod expand_to_fused;
pub mod get_fused_mapping;
pub mod reduce_fused;
pub mod topk_gate;

pub use expand_to_fused::{expand_to_fused, expand_to_fused_with_sf};
pub use get_fused_mapping::{get_fused_mapping, get_fused_mapping_alloc};
pub use reduce_fused::reduce_fused;
pub use topk_gate::topk_gate;

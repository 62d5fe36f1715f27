//! Mixture of experts: gating and routing.
//!
//! `num_tokens` tokens choose `num_topk` experts each. An index of -1 means no expert, no row, or padding.
//!
//! The expanded buffer has one row for each choice that stays on this rank, grouped by expert in ascending order. Expert `e` owns rows
//! `expert_start[e]..expert_end[e]`, a multiple of the alignment; the used ones come first. [`get_fused_mapping()`] builds the index
//! tensors that say which row is which, [`expand_to_fused()`] fills the buffer with the tokens' rows, and [`reduce_fused()`] adds a token's rows up again.
//! [`MoeRouter`] does all that in the right order, forward and backward.

pub mod aux_fi;
mod common_count;
pub mod expand_to_fused;
pub mod get_fused_mapping;
pub mod group_count;
pub mod inplace_unique_group_indices;
pub mod mask_indices_by_tp;
pub mod moe_topk_gate_backward;
pub mod moe_topk_gate_forward;
pub mod normalize_weight;
pub mod reduce_fused;
pub mod reduce_fused_backward;
pub mod router;
pub mod top2_sum_gate;
pub mod topk_gate;
pub mod topk_sum_and_topk_group_idx;

pub use aux_fi::aux_fi;
pub use expand_to_fused::{expand_to_fused, expand_to_fused_with_sf};
pub use get_fused_mapping::{
    check_indices, get_fused_mapping, get_fused_mapping_alloc, get_fused_mapping_exact, max_expanded_tokens,
};
pub use group_count::group_count;
pub use inplace_unique_group_indices::inplace_unique_group_indices;
pub use mask_indices_by_tp::mask_indices_by_tp;
pub use moe_topk_gate_backward::moe_topk_gate_backward;
pub use moe_topk_gate_forward::moe_topk_gate_forward;
pub use normalize_weight::normalize_weight;
pub use reduce_fused::reduce_fused;
pub use reduce_fused_backward::reduce_fused_backward;
pub use router::MoeRouter;
pub use top2_sum_gate::top2_sum_gate;
pub use topk_gate::topk_gate;
pub use topk_sum_and_topk_group_idx::topk_sum_and_topk_group_idx;

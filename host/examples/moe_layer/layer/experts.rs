//! The experts, on the CPU: `y = down * silu(up * x)`, one row after the other, rows spread over the cores.

use indicatif::ProgressBar;
use rayon::prelude::*;

/// Weights of all experts.
pub struct Experts {
    /// Channels of a token.
    pub hidden: usize,
    /// Channels in between.
    pub intermediate: usize,
    /// `[experts, intermediate, hidden]`.
    pub up: Vec<f32>,
    /// `[experts, hidden, intermediate]`.
    pub down: Vec<f32>,
}

impl Experts {
    /// Rows of the expanded buffer through their experts; those without one become zeros.
    pub fn forward(&self, x: &[f32], pos_to_expert: &[i32], progress: &ProgressBar) -> Vec<f32> {
        let h = self.hidden;
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(h).zip(x.par_chunks(h)).zip(pos_to_expert).for_each(|((y, x), expert)| {
            if let Ok(expert) = usize::try_from(*expert) {
                let (up, down) = self.of(expert);
                let middle: Vec<f32> = up.chunks(h).map(|row| silu(dot(row, x))).collect();
                y.iter_mut().zip(down.chunks(self.intermediate)).for_each(|(y, row)| *y = dot(row, &middle));
            }
            progress.inc(1);
        });
        y
    }

    /// The gradient with respect to `x` from that with respect to what [`forward`](Self::forward) gives.
    pub fn backward(&self, x: &[f32], grad_y: &[f32], pos_to_expert: &[i32], progress: &ProgressBar) -> Vec<f32> {
        let h = self.hidden;
        let mut grad_x = vec![0.0; x.len()];
        let rows = grad_x.par_chunks_mut(h).zip(x.par_chunks(h)).zip(grad_y.par_chunks(h)).zip(pos_to_expert);
        rows.for_each(|(((grad_x, x), grad_y), expert)| {
            if let Ok(expert) = usize::try_from(*expert) {
                let (up, down) = self.of(expert);
                let mut grad_middle = vec![0.0; self.intermediate];
                down.chunks(self.intermediate).zip(grad_y).for_each(|(row, grad)| add_scaled(&mut grad_middle, *grad, row));
                up.chunks(h).zip(&grad_middle).for_each(|(row, grad)| add_scaled(grad_x, grad * silu_slope(dot(row, x)), row));
            }
            progress.inc(1);
        });
        grad_x
    }

    /// Both matrices of one expert.
    pub fn of(&self, expert: usize) -> (&[f32], &[f32]) {
        let len = self.hidden * self.intermediate;
        (&self.up[expert * len..][..len], &self.down[expert * len..][..len])
    }
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

fn silu_slope(x: f32) -> f32 {
    let sigmoid = 1.0 / (1.0 + (-x).exp());
    sigmoid * (1.0 + x * (1.0 - sigmoid))
}

/// Eight sums side by side: as many as a vector of the CPU holds.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// `to += factor * from`.
pub fn add_scaled(to: &mut [f32], factor: f32, from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
}

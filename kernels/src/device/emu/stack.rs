//! Stacks of coroutines: cut from large lazily mapped slabs, because a guard page per emulated thread would exhaust the
//! number of mappings a process may have.

#[cfg(not(windows))]
pub use slab::{Stack, StackPool};

#[cfg(not(windows))]
mod slab {
    use corosensei::stack::{Stack as CorosenseiStack, StackPointer};
    use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};

    /// Bytes a thread gets; only the touched pages cost memory. A panic message is formatted on it too. Not a power of two: the
    /// hot ends of a block's stacks would all fall into the same few cache sets.
    const BYTES: usize = (128 << 10) + 25 * 64;
    /// Stacks a slab holds.
    const PER_SLAB: usize = 64;
    /// Stands at the far end of every stack; gone means that the stack overflowed.
    const CANARY: u64 = 0x5a6b_c3d2_9e81_7f40;

    struct Slab(*mut u8);

    impl Slab {
        fn layout() -> Layout {
            Layout::from_size_align(BYTES * PER_SLAB, 4096).expect("a constant size")
        }
    }

    impl Drop for Slab {
        fn drop(&mut self) {
            // SAFETY: allocated with this layout in `StackPool::take`.
            unsafe { dealloc(self.0, Self::layout()) }
        }
    }

    /// One stack. It must not outlive the pool it came from; the scheduler returns all stacks before it drops a pool.
    pub struct Stack {
        limit: usize,
    }

    impl Stack {
        /// Whether the thread stayed inside.
        pub fn intact(&self) -> bool {
            // SAFETY: the word was written when the stack was cut and lies inside the slab.
            unsafe { (self.limit as *const u64).read() == CANARY }
        }
    }

    // SAFETY: base and limit delimit `BYTES` writable bytes that nothing else uses.
    unsafe impl CorosenseiStack for Stack {
        fn base(&self) -> StackPointer {
            StackPointer::new(self.limit + BYTES).expect("a heap address")
        }

        fn limit(&self) -> StackPointer {
            StackPointer::new(self.limit).expect("a heap address")
        }
    }

    /// Unused stacks of one core.
    #[derive(Default)]
    pub struct StackPool {
        free: Vec<Stack>,
        slabs: Vec<Slab>,
    }

    impl StackPool {
        pub fn take(&mut self) -> Stack {
            if self.free.is_empty() {
                // SAFETY: the layout is not empty; the canary word is inside the slab.
                unsafe {
                    let slab = alloc(Slab::layout());
                    if slab.is_null() {
                        handle_alloc_error(Slab::layout());
                    }
                    self.slabs.push(Slab(slab));
                    for i in 0..PER_SLAB {
                        let limit = slab as usize + i * BYTES;
                        (limit as *mut u64).write(CANARY);
                        self.free.push(Stack { limit });
                    }
                }
            }
            self.free.pop().expect("just filled")
        }

        pub fn give(&mut self, stack: Stack) {
            if !stack.intact() {
                // SAFETY: as above; the fault has been reported, the stack is good again.
                unsafe { (stack.limit as *mut u64).write(CANARY) }
            }
            self.free.push(stack);
        }
    }
}

#[cfg(windows)]
mod mapped {
    /// Windows wants its own bookkeeping in a stack, so it gets the library's stacks there.
    pub struct Stack(corosensei::stack::DefaultStack);

    impl Stack {
        pub fn intact(&self) -> bool {
            true
        }
    }

    // SAFETY: forwards to a correct implementation.
    unsafe impl corosensei::stack::Stack for Stack {
        fn base(&self) -> corosensei::stack::StackPointer {
            self.0.base()
        }
        fn limit(&self) -> corosensei::stack::StackPointer {
            self.0.limit()
        }
        fn teb_fields(&self) -> corosensei::stack::StackTebFields {
            self.0.teb_fields()
        }
        fn update_teb_fields(&mut self, limit: usize, guaranteed: usize) {
            self.0.update_teb_fields(limit, guaranteed)
        }
    }

    #[derive(Default)]
    pub struct StackPool(Vec<Stack>);

    impl StackPool {
        pub fn take(&mut self) -> Stack {
            self.0.pop().unwrap_or_else(|| Stack(corosensei::stack::DefaultStack::new(128 << 10).expect("memory for a stack")))
        }
        pub fn give(&mut self, stack: Stack) {
            self.0.push(stack);
        }
    }
}
#[cfg(windows)]
pub use mapped::{Stack, StackPool};

//! `cargo xtask stub`: a `libcuda.so` that lets programs link, and start, without CUDA.
//!
//! `cust_raw` links with `-lcuda`. A shared library of that name would become a needed library of every program, which
//! then would not even start without a driver. So `libcuda.so` is a one-line linker script that pulls in an archive: for
//! each function `cust_raw` declares, a jump through a slot. At the first call the slot is filled from `libcuda.so.1`,
//! or, where there is none, with a function that returns CUDA_ERROR_NO_DEVICE. Later calls cost one indirect jump.

use crate::{Failure, Result, fail, shell};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::Command;

/// The `cu*` functions that `cust_raw` 0.11.3 declares.
const NAMES: &str = include_str!("cuda_names.txt");

/// Finds the real function. `@N@` and `@NAMES@` are filled in by [`c_source`].
const RESOLVER: &str = r#"// Written by `cargo xtask stub`.
#include <dlfcn.h>
#include <stddef.h>
#include <string.h>

static const char *const names[] = {
@NAMES@};
#define NUM_NAMES @N@

// Where each trampoline jumps; filled at its first call. Two threads may both fill a slot: they write the same value.
extern void *ferrotile_cuda_slots[] __attribute__((visibility("hidden")));

static int no_device(void) { return 100; } // CUDA_ERROR_NO_DEVICE
static int not_found(void) { return 500; } // CUDA_ERROR_NOT_FOUND: this driver is too old to have the function


// cust panics when it prints an error whose text it cannot get, so the texts have to be there without a driver.
static int error_name(int error, const char **text) {
    *text = error == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_UNKNOWN";
    return 0;
}
static int error_string(int error, const char **text) {
    *text = error == 100 ? "no CUDA driver: libcuda.so.1 cannot be loaded" : "unknown error (no CUDA driver)";
    return 0;
}

static void *without_driver(const char *name) {
    if (!strcmp(name, "cuGetErrorName")) return (void *)error_name;
    if (!strcmp(name, "cuGetErrorString")) return (void *)error_string;
    return (void *)no_device;
}

__attribute__((visibility("hidden"))) void *ferrotile_cuda_resolve(size_t index) {
    // dlopen counts references and locks by itself, so a race costs nothing but a second count.
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    void *found = driver ? dlsym(driver, names[index]) : without_driver(names[index]);
    if (!found) found = (void *)not_found;
    __atomic_store_n(&ferrotile_cuda_slots[index], found, __ATOMIC_RELEASE);
    return found;
}
"#;

/// Common end of the first call of every function: index in r11, all argument registers kept.
const FIRST_CALL: &str = r"
.text
ferrotile_cuda_first_call:
    push %rbp
    mov %rsp, %rbp
    and $-16, %rsp
    sub $192, %rsp
    mov %rdi, (%rsp)
    mov %rsi, 8(%rsp)
    mov %rdx, 16(%rsp)
    mov %rcx, 24(%rsp)
    mov %r8, 32(%rsp)
    mov %r9, 40(%rsp)
    mov %rax, 48(%rsp)
    movaps %xmm0, 64(%rsp)
    movaps %xmm1, 80(%rsp)
    movaps %xmm2, 96(%rsp)
    movaps %xmm3, 112(%rsp)
    movaps %xmm4, 128(%rsp)
    movaps %xmm5, 144(%rsp)
    movaps %xmm6, 160(%rsp)
    movaps %xmm7, 176(%rsp)
    mov %r11, %rdi
    call ferrotile_cuda_resolve
    mov %rax, %r11
    mov (%rsp), %rdi
    mov 8(%rsp), %rsi
    mov 16(%rsp), %rdx
    mov 24(%rsp), %rcx
    mov 32(%rsp), %r8
    mov 40(%rsp), %r9
    mov 48(%rsp), %rax
    movaps 64(%rsp), %xmm0
    movaps 80(%rsp), %xmm1
    movaps 96(%rsp), %xmm2
    movaps 112(%rsp), %xmm3
    movaps 128(%rsp), %xmm4
    movaps 144(%rsp), %xmm5
    movaps 160(%rsp), %xmm6
    movaps 176(%rsp), %xmm7
    mov %rbp, %rsp
    pop %rbp
    jmp *%r11
";

fn names() -> impl Iterator<Item = &'static str> {
    NAMES.lines().filter(|name| !name.is_empty())
}

/// The resolver in C.
fn c_source() -> String {
    let list: String = names().map(|name| format!("    \"{name}\",\n")).collect();
    RESOLVER.replace("@NAMES@", &list).replace("@N@", &names().count().to_string())
}

/// The trampolines in assembly, hidden so that they never take the place of the real driver's symbols.
fn asm_source() -> String {
    let mut text = String::from("# Written by `cargo xtask stub`.");
    text.push_str(FIRST_CALL);
    let mut slots =
        String::from(".data\n.align 8\n.globl ferrotile_cuda_slots\n.hidden ferrotile_cuda_slots\nferrotile_cuda_slots:\n");
    for (index, name) in names().enumerate() {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            ".globl {name}\n.hidden {name}\n.type {name}, @function\n{name}:\n    mov ferrotile_cuda_slots+{}(%rip), %r11\n    jmp *%r11\nfirst_{name}:\n    mov ${index}, %r11d\n    jmp ferrotile_cuda_first_call\n",
            index * 8
        );
        let _ = writeln!(slots, "    .quad first_{name}");
    }
    text + &slots + ".section .note.GNU-stack,\"\",@progbits\n"
}

/// Make the stub if it is absent or of other source; returns the folder for CUDA_LIBRARY_PATH (the library is in its `lib64`).
pub fn ensure() -> Result<PathBuf> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return fail("the libcuda stub exists for x86-64 Linux only; install CUDA and set CUDA_LIBRARY_PATH to it");
    }
    let stub = shell::device_dir().join("cuda-stub");
    let lib = stub.join("lib64");
    let (c, s) = (c_source(), asm_source());
    let mark = stub.join("sha256");
    let wanted = shell::sha256(&format!("{c}{s}"));
    if std::fs::read_to_string(&mark).is_ok_and(|have| have == wanted) && lib.join("libcuda.so").is_file() {
        return Ok(stub);
    }
    for program in ["cc", "ar"] {
        if !shell::has_program(program) {
            return fail(format!("`{program}` is missing, which the libcuda stub is made with; type: apt-get install gcc"));
        }
    }
    let build = stub.join("build");
    shell::write(&build.join("resolve.c"), &c)?;
    shell::write(&build.join("trampolines.s"), &s)?;
    shell::output(Command::new("cc").current_dir(&build).args([
        "-O2",
        "-fPIC",
        "-Wall",
        "-Werror",
        "-c",
        "resolve.c",
        "trampolines.s",
    ]))?;
    shell::create_dir(&lib)?;
    let archive = lib.join("libcuda_lazy.a");
    if archive.exists() {
        // `ar` would add to it.
        std::fs::remove_file(&archive).map_err(|e| Failure(format!("cannot remove {}: {e}", archive.display())))?;
    }
    shell::output(Command::new("ar").current_dir(&build).arg("rcs").arg(&archive).args(["resolve.o", "trampolines.o"]))?;
    // The linker looks for the archive in its library folders, of which this is one.
    shell::write(&lib.join("libcuda.so"), "/* Written by `cargo xtask stub`. */\nINPUT(libcuda_lazy.a)\n")?;
    shell::write(&mark, &wanted)?;
    Ok(stub)
}

/// Let a cargo command link with `cust`, unless the user has said where CUDA is. The stub serves machines with a driver
/// too: it calls the driver that it finds at run time.
pub fn link(command: &mut Command) -> Result<&mut Command> {
    if std::env::var_os("CUDA_LIBRARY_PATH").is_none() {
        command.env("CUDA_LIBRARY_PATH", ensure()?);
    }
    Ok(command)
}

/// `cargo xtask stub`.
pub fn run() -> Result {
    println!("{}", ensure()?.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_trampoline_and_a_slot() {
        let (c, s) = (c_source(), asm_source());
        assert_eq!(names().count(), 353);
        for name in names() {
            assert!(c.contains(&format!("    \"{name}\",\n")), "{name}");
            assert!(s.contains(&format!("\n{name}:\n")) && s.contains(&format!(".quad first_{name}\n")), "{name}");
        }
        assert!(c.contains("#define NUM_NAMES 353"));
    }

    /// A C program calls through the stub with integer, pointer and float arguments, first without a driver and then
    /// with a driver of our own.
    #[test]
    fn calls_reach_a_driver_or_say_that_there_is_none() {
        let stub = ensure().unwrap().join("lib64");
        let dir = std::env::temp_dir().join(format!("ferrotile-stub-{}", std::process::id()));
        shell::write(
            &dir.join("program.c"),
            r#"#include <stdio.h>
            int cuInit(unsigned); int cuTexRefSetMipmapLevelBias(void *, float); int cuCtxSynchronize(void);
            int cuGetErrorString(int, const char **);
            int cuLaunchKernel(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
            int main(void) {
                int bias = cuTexRefSetMipmapLevelBias((void *)7, 2.5f);
                int again = cuTexRefSetMipmapLevelBias((void *)7, 2.5f);
                int launch = cuLaunchKernel((void *)1, 2, 3, 4, 5, 6, 7, 8, (void *)9, (void **)10, (void **)11);
                const char *text = "";
                int known = cuGetErrorString(100, &text);
                printf("%d %d %d %d %d %d %s\n", cuInit(0), bias, again, launch, cuCtxSynchronize(), known, text);
                return 0;
            }"#,
        )
        .unwrap();
        shell::write(
            &dir.join("driver.c"),
            r#"int cuInit(unsigned flags) { return flags; }
            int cuTexRefSetMipmapLevelBias(long a, float b) { return a * 100 + (int)(b * 2); }
            int cuLaunchKernel(long a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f, unsigned g, unsigned h, long i, long j, long k) {
                return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 9 * i + 10 * j + 11 * k;
            }"#,
        )
        .unwrap();
        let cc = |args: &[&str]| shell::output(Command::new("cc").current_dir(&dir).args(args)).unwrap();
        cc(&["program.c", "-o", "program", &format!("-L{}", stub.display()), "-lcuda", "-ldl"]);
        // Only a machine without a driver can show the first case.
        if crate::driver::probe() == crate::driver::Driver::Missing {
            let out = shell::output(&mut Command::new(dir.join("program"))).unwrap();
            assert_eq!(out, "100 100 100 100 100 0 no CUDA driver: libcuda.so.1 cannot be loaded\n");
        }
        cc(&["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "driver.c", "-o", "libcuda.so.1"]);
        let out = shell::output(Command::new(dir.join("program")).env("LD_LIBRARY_PATH", &dir)).unwrap();
        // cuLaunchKernel: 1 + 4 + 9 + 16 + 25 + 36 + 49 + 64 + 81 + 100 + 121; the last two are not in that driver.
        assert_eq!(out, "0 705 705 506 500 500 \n");
        shell::remove_dir(&dir).unwrap();
    }
}

//! What must not compile, and the words in which the compiler says so.

#[test]
fn misuse_does_not_compile() {
    trybuild::TestCases::new().compile_fail("misuse/*.rs");
}

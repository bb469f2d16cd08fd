//! The `melglow` command line.

fn main() -> std::process::ExitCode {
    melglow::cli::main()
}

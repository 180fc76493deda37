// SPDX-License-Identifier: MIT
//
// Trains a diffusion transformer with a mixture-of-experts feed-forward, draws with it, and looks at its routing.
//
//     dit train --out DIR [--resume] [...]         trains, then draws; everything it writes is in DIR
//     dit sample --checkpoint FILE --out DIR       draws with a checkpoint, ours or one of the references
//     dit analyse --checkpoint FILE --out DIR      the same, and who was routed where, by class, position and timestep
//     dit upcycle --checkpoint FILE --out FILE     a dense model becomes a mixture of experts
//     dit predict --checkpoint FILE --input FILE --out FILE    the network's output for given inputs
//     dit zoo                                      the named models of the papers, and what they cost
//
// The exit status is 0 if everything was written, 130 if Ctrl-C or SIGTERM ended the command before, and else 1 or, for an
// option that is not understood, CLI11's.
#include <csignal>
#include <dit/command_line.hpp>
#include <dit/options.hpp>
#include <iostream>
#include <new>

namespace {

int run(int argc, char** argv) {
  dit::CommandLine line;
  try {
    line.parse(argc, argv);
    // A limit of file sizes, and a reader that has gone away, are errors of a write.
    std::signal(SIGXFSZ, SIG_IGN);
    std::signal(SIGPIPE, SIG_IGN);
    return line.run();
  } catch (const CLI::ParseError& error) {  // among them the request for help
    return line.app.exit(error);
  } catch (const dit::commands::Interrupted& error) {
    std::cout << error.what() << "\n";
    return 130;
  } catch (const std::bad_alloc&) {
    std::cerr << "dit: there is not enough memory\n";
  } catch (const std::exception& error) {
    std::cerr << "dit: " << dit::terminal_text(error.what()) << "\n";
  }
  return 1;
}

}  // namespace

int main(int argc, char** argv) { return dit::finished(run(argc, argv), std::cout, "dit"); }

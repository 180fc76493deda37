// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fuzz/safetensors_damage.hpp>
#include <io/files.hpp>
#include <moxie/io/safetensors.hpp>
#include <string>
#include <temporary_folder.hpp>
#include <vector>

namespace fs = std::filesystem;

TEST_CASE("safetensors: one header gives all of io") {
  const moxie::test::TemporaryFolder directory;
  const moxie::Parameters<float> saved = moxie::test::random_parameters<float>(1);
  moxie::save_parameters(directory / "file", saved);
  moxie::Parameters<float> loaded(moxie::test::small_layout());
  moxie::load_parameters(directory / "file", loaded);
  CHECK((loaded.flat() == saved.flat()).all());
  moxie::ReplacementFile(directory / "text").commit();
  CHECK(moxie::reads_as<float>(moxie::DType::F16));
  CHECK(moxie::shape_text(moxie::SafetensorsFile(directory / "file").info("bias").shape) == "(5)");
}

TEST_CASE("safetensors: any damage either loads whole or is refused with the target left alone") {
  constexpr int executions = 4000;
  const moxie::test::TemporaryFolder directory;
  const fs::path path = directory / "file";
  const std::vector<std::string> originals = moxie::test::whole_files();
  moxie::Parameters<float> target(moxie::test::small_layout());
  target.flat().setConstant(7);
  int accepted = 0;
  int loaded = 0;
  for (int i = 0; i < executions; ++i) {
    moxie::test::SafetensorsDamage damage(20'240'607, static_cast<std::uint64_t>(i));
    const std::string bytes = damage.damaged(originals[static_cast<std::size_t>(i) % originals.size()]);
    moxie::test::write_bytes(path, bytes);
    CAPTURE(i);
    try {
      const moxie::SafetensorsFile file(path);
      ++accepted;
      std::size_t held = 0;
      for (const std::string& name : file.names()) {
        held += file.read_bytes(name).size();
      }
      CHECK(held < bytes.size());
      moxie::load_parameters(file, target);
      ++loaded;
      target.flat().setConstant(7);
    } catch (const moxie::FileError& error) {
      CHECK(std::string(error.what()).starts_with(path.string() + ": "));
      CHECK((target.flat() == 7).all());
    }
  }
  CHECK(accepted > executions / 50);
  CHECK(loaded > executions / 100);
  CHECK(accepted < executions);
}

// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <io/files.hpp>
#include <moxie/core/parameters.hpp>
#include <moxie/io/parameters.hpp>
#include <string>
#include <temporary_folder.hpp>
#include <vector>

namespace {

namespace fs = std::filesystem;
using moxie::Index;
using moxie::SafetensorsError;
using moxie::SafetensorsFile;
using moxie::SafetensorsWriter;
using moxie::test::bytes_of;
using moxie::test::contains;
using moxie::test::message_of;
using moxie::test::random_parameters;
using moxie::test::small_layout;
using moxie::test::write_bytes;
using TemporaryDirectory = moxie::test::TemporaryFolder;

}  // namespace

TEST_CASE_TEMPLATE("load_parameters: saved parameters load to the same bits", Scalar, float, double) {
  const TemporaryDirectory directory;
  const moxie::Parameters<Scalar> saved = random_parameters<Scalar>(1);
  moxie::save_parameters(directory / "file", saved, {{"step", "3"}});
  moxie::Parameters<Scalar> loaded(small_layout());
  moxie::load_parameters(directory / "file", loaded);
  CHECK((loaded.flat() == saved.flat()).all());
  CHECK(SafetensorsFile(directory / "file").metadata().at("step") == "3");
  CHECK(SafetensorsFile(directory / "file").info("experts").shape == std::vector<Index>{2, 3, 4});
  CHECK(directory.entries() == 1);
}

TEST_CASE("load_parameters: several blocks of parameters live in one file under their prefixes") {
  const TemporaryDirectory directory;
  const moxie::Parameters<float> weights = random_parameters<float>(1);
  const moxie::Parameters<float> averages = random_parameters<float>(2);
  const moxie::Parameters<double> moments = random_parameters<double>(3);
  const std::vector<std::int64_t> step{12};
  SafetensorsWriter writer;
  writer.add_parameters(weights.view());
  writer.add_parameters(averages, "ema.");
  writer.add_parameters(moments, "adam.m.");
  writer.add("step", {}, step);
  writer.save(directory / "file");

  const SafetensorsFile file(directory / "file");
  moxie::Parameters<float> w(small_layout());
  moxie::Parameters<float> a(small_layout());
  moxie::Parameters<double> m(small_layout());
  moxie::load_parameters(file, w.view(), "", moxie::ExtraTensors::Ignore);
  moxie::load_parameters(file, a, "ema.");
  moxie::load_parameters(file, m, "adam.m.");
  CHECK((w.flat() == weights.flat()).all());
  CHECK((a.flat() == averages.flat()).all());
  CHECK((m.flat() == moments.flat()).all());
  CHECK(contains(message_of([&] { moxie::load_parameters(file, w); }), "is not among the parameters to load"));

  moxie::load_parameters(file, a, "adam.m.");
  CHECK((a.flat() == moments.flat().cast<float>()).all());
  moxie::load_parameters(file, m, "ema.");
  CHECK((m.flat() == averages.flat().cast<double>()).all());
}

TEST_CASE("load_parameters: all or nothing is loaded") {
  const TemporaryDirectory directory;
  const moxie::Parameters<float> saved = random_parameters<float>(1);
  const fs::path path = directory / "file";
  const auto refused = [&](const moxie::Layout& layout, const std::string& problem) {
    moxie::Parameters<float> target(layout);
    target.flat().setConstant(7);
    const std::string message = message_of([&] { moxie::load_parameters(path, target); });
    CAPTURE(message);
    CHECK(contains(message, problem));
    CHECK(contains(message, path.string()));
    CHECK((target.flat() == 7).all());
  };
  moxie::save_parameters(path, saved);

  moxie::Layout more = small_layout();
  more.add("z", {1});
  refused(more, "tensor 'z' is missing");

  moxie::Layout fewer;
  fewer.add("gate/w", {4, 3});
  fewer.add("bias", {5});
  fewer.add("scale", {});
  fewer.add("none", {0, 7});
  refused(fewer, "tensor 'experts' is not among the parameters to load");

  moxie::Layout reshaped = fewer;
  reshaped.add("experts", {6, 4});
  refused(reshaped, "tensor 'experts' has the shape (2,3,4), expected (6,4)");

  moxie::Layout none = fewer;
  none.add("experts", {0});
  refused(none, "tensor 'experts' has the shape (2,3,4), expected (0)");

  const std::vector<std::int32_t> integers(24);
  SafetensorsWriter writer;
  moxie::Parameters<float> part(fewer);
  writer.add_parameters(part);
  writer.add("experts", {2, 3, 4}, integers);
  writer.save(path);
  refused(small_layout(), "tensor 'experts' is I32, which cannot be read as F32");
}

TEST_CASE("load_parameters: a truncated file is refused and the target is left alone") {
  const TemporaryDirectory directory;
  moxie::save_parameters(directory / "whole", random_parameters<float>(1));
  const std::string bytes = bytes_of(directory / "whole");
  moxie::Parameters<float> target(small_layout());
  target.flat().setConstant(7);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    write_bytes(directory / "part", bytes.substr(0, size));
    CHECK_THROWS_AS(moxie::load_parameters(directory / "part", target), SafetensorsError);
  }
  CHECK((target.flat() == 7).all());
  write_bytes(directory / "part", bytes + '\0');
  CHECK_THROWS_AS(moxie::load_parameters(directory / "part", target), SafetensorsError);
  CHECK((target.flat() == 7).all());
}

TEST_CASE("load_parameters: a state dict of wrapped modules loads once it is renamed, and the errors lead there") {
  const TemporaryDirectory directory;
  const moxie::Parameters<float> saved = random_parameters<float>(1);
  const std::vector<std::int64_t> counter{7};
  SafetensorsWriter writer;
  writer.add_parameters(saved, "module._orig_mod.");
  writer.add("module.norm.num_batches_tracked", {}, counter);
  writer.save(directory / "file");
  SafetensorsFile file(directory / "file");
  moxie::Parameters<float> loaded(small_layout());
  const auto loading = [&] { return message_of([&] { moxie::load_parameters(file, loaded); }); };
  CHECK(contains(loading(), "is missing: there is tensor 'module._orig_mod."));
  file.rename(moxie::without_wrappers);
  CHECK(contains(loading(),
                 "tensor 'norm.num_batches_tracked' is not among the parameters to load: I64 (), which "
                 "ExtraTensors::Ignore would skip"));
  CHECK((loaded.flat() == 0).all());
  moxie::load_parameters(file, loaded, "", moxie::ExtraTensors::Ignore);
  CHECK((loaded.flat() == saved.flat()).all());
}

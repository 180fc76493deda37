// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <nn/generated_shapes.hpp>

TEST_CASE("generated_shapes: ten classes in turn, pixels in [-1, 1], nothing cut off at the border") {
  const nn::ImageSet set = nn::generated_shapes(1000, moxie::Rng{7});
  CHECK(set.count() == 1000);
  CHECK(set.channels == 1);
  CHECK(set.height == 28);
  CHECK(set.width == 28);
  CHECK(set.images.cols() == 28 * 28);
  REQUIRE(set.labels.size() == 1000);
  CHECK(set.class_names.size() == 10);
  CHECK(set.images.minCoeff() == -1.0F);
  CHECK(set.images.maxCoeff() <= 1.0F);
  CHECK(set.images.maxCoeff() > 0.9F);
  for (moxie::Index i = 0; i < 1000; ++i) {
    CAPTURE(i);
    CHECK(set.labels[static_cast<std::size_t>(i)] == i % 10);
    CHECK(set.images.row(i).maxCoeff() > 0.1F);
    const auto image = set.images.row(i).reshaped<Eigen::RowMajor>(28, 28);
    CHECK(image.row(0).maxCoeff() == -1.0F);
    CHECK(image.row(27).maxCoeff() == -1.0F);
    CHECK(image.col(0).maxCoeff() == -1.0F);
    CHECK(image.col(27).maxCoeff() == -1.0F);
  }
}

TEST_CASE("generated_shapes: the same images for any number of threads, others for another seed") {
  const nn::ImageSet one = nn::generated_shapes(200, moxie::Rng{7}, {.threads = 1});
  CHECK(one.images == nn::generated_shapes(200, moxie::Rng{7}, {.threads = 7}).images);
  CHECK(one.images == nn::generated_shapes(500, moxie::Rng{7}).images.topRows(200));
  CHECK(one.images != nn::generated_shapes(200, moxie::Rng{8}).images);
  CHECK_THROWS_AS(nn::generated_shapes(0, moxie::Rng{7}), moxie::ValueError);
}

TEST_CASE("generated_shapes: the nearest known image has the same class") {
  const nn::ImageSet known = nn::generated_shapes(2000, moxie::Rng{1});
  const nn::ImageSet fresh = nn::generated_shapes(300, moxie::Rng{2});
  int right = 0;
  for (moxie::Index i = 0; i < fresh.count(); ++i) {
    moxie::Index nearest = 0;
    (known.images.rowwise() - fresh.images.row(i)).rowwise().squaredNorm().minCoeff(&nearest);
    right += known.labels[static_cast<std::size_t>(nearest)] == fresh.labels[static_cast<std::size_t>(i)] ? 1 : 0;
  }
  MESSAGE("nearest neighbour: " << right << " of " << fresh.count() << " right");
  CHECK(right > 270);
}

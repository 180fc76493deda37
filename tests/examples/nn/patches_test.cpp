// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/moxie.hpp>
#include <nn/patches.hpp>

using moxie::Index;
using moxie::Matrix;

TEST_CASE("patchify: tokens are the patches row after row, and unpatchify is the inverse") {
  Matrix<float> images(2, 36);
  for (Index i = 0; i < images.size(); ++i) {
    images.data()[i] = float(i);
  }
  Matrix<float> tokens(2 * 9, 4);
  nn::patchify<float>(images, 6, 2, tokens);
  CHECK(tokens.row(0) == Matrix<float>{{0, 1, 6, 7}});
  CHECK(tokens.row(1) == Matrix<float>{{2, 3, 8, 9}});
  CHECK(tokens.row(3) == Matrix<float>{{12, 13, 18, 19}});
  CHECK(tokens.row(9) == Matrix<float>{{36, 37, 42, 43}});
  Matrix<float> back(2, 36);
  nn::unpatchify<float>(tokens, 6, 2, back);
  CHECK(back == images);
}

TEST_CASE("patchify: refuses patches that do not make up an image, and other shapes") {
  Matrix<float> images = Matrix<float>::Zero(2, 36), tokens = Matrix<float>::Zero(18, 4);
  CHECK_THROWS_AS(nn::patchify<float>(images, 6, 4, tokens), moxie::ValueError);
  CHECK_THROWS_AS(nn::patchify<float>(images, 6, 0, tokens), moxie::ValueError);
  CHECK_THROWS_AS(nn::patchify<float>(images, 5, 1, tokens), moxie::ShapeError);
  CHECK_THROWS_AS(nn::patchify<float>(images, 6, 3, tokens), moxie::ShapeError);
  CHECK_THROWS_AS(nn::unpatchify<float>(tokens, 6, 3, images), moxie::ShapeError);
}

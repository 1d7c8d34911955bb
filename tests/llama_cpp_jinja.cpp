// Renders a chat template, the file that is named, with llama.cpp's own Jinja: see test_llama_cpp.py. A line in is what
// the template is given, as JSON; a line out is what it says, as JSON.

#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "json.h"

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>

extern "C" void ggml_abort(const char *, int, const char *, ...) { std::abort(); }  // instead of all of ggml

int main(int, char ** argv) {
    std::ifstream file(argv[1]);
    jinja::lexer lexer;
    auto lexed = lexer.tokenize(std::string(std::istreambuf_iterator<char>(file), {}));
    jinja::program program = jinja::parse_from_tokens(lexed);
    for (std::string line; std::getline(std::cin, line);) {
        jinja::context context(lexed.source);
        jinja::global_from_json(context, common_json::parse(line), true);
        jinja::runtime runtime(context);
        auto said = jinja::runtime::gather_string_parts(runtime.execute(program));
        std::cout << common_json(said->as_string().str()).dump() << "\n";
    }
}

# Installs the build into a fresh prefix, then builds and runs this project against it.

function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE ${work})
file(MAKE_DIRECTORY ${work})
run(${CMAKE_COMMAND} --install ${build} --prefix ${work}/prefix --config "${config}")
run(${CMAKE_COMMAND} -S ${source} -B ${work}/build -G ${generator} -D CMAKE_CXX_COMPILER=${compiler}
  -D CMAKE_PREFIX_PATH=${work}/prefix -D CMAKE_BUILD_TYPE=${config} -D CMAKE_FIND_USE_PACKAGE_REGISTRY=OFF)
run(${CMAKE_COMMAND} --build ${work}/build --config "${config}")
find_program(consumer consumer PATHS ${work}/build ${work}/build/${config} NO_DEFAULT_PATH REQUIRED)
run(${consumer})

if(pkg_config)
  set(ENV{PKG_CONFIG_PATH} ${work}/prefix/${libdir}/pkgconfig)
  execute_process(COMMAND ${pkg_config} --cflags --libs "binconv >= 0.1" OUTPUT_VARIABLE flags
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  separate_arguments(flags UNIX_COMMAND "${flags}")
  run(${compiler} -std=c++17 ${source}/main.cpp ${flags} -Wl,-rpath,${work}/prefix/${libdir} -o ${work}/consumer)
  run(${work}/consumer)
endif()
